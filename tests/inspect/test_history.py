"""The history of a graph: what each pass changed, the same for a model, its checkpoint and its plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

import fxquant
from fxquant.errors import CheckpointError, ConfigurationError, UnknownNameError
from fxquant.inspect.history import History, rewrite_histories, rewrite_history
from fxquant.inspect.sources import graphs_of
from fxquant.runtime.model import GraphModel
from tests.sampling import covering
from tests.tiny import calibrate, make_dit, run

pytestmark = pytest.mark.usefixtures("torchao_on_any_processor")
OUT = "transformer_blocks.0.attn1.to_out.0"
VALUE = "transformer_blocks.0.attn1.to_v"


@pytest.fixture(scope="module")
def quantized() -> GraphModel:
    model = make_dit()
    return fxquant.compile(model, recipe="htg-w8a8", calibrate=calibrate(model), measure=0)


@pytest.fixture(scope="module")
def history(quantized: GraphModel) -> History:
    return rewrite_history(quantized)


def test_model_checkpoint_and_plan_have_one_history(
    quantized: GraphModel, history: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fxquant.save(quantized, tmp_path / "model")
    copy = torch.Tensor.copy_

    def fake_copy(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert isinstance(self, FakeTensor), "a tensor with values was loaded"
        return copy(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "copy_", fake_copy)
    for found in (rewrite_history(tmp_path / "model"), rewrite_history(quantized.plan, model=make_dit())):
        assert [step.nodes for step in found.steps] == [step.nodes for step in history.steps]
        assert [step.tensors for step in found.steps] == [step.tensors for step in history.steps]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "backend"), covering(["ptq4dit-w4a8", "rtn-dynamic-w8a8"], ["native", "torchao"], together=1)
)
def test_the_lowered_graph_of_a_checkpoint_is_that_of_the_model(backend: str, recipe: str, tmp_path: Path) -> None:
    model = make_dit()
    quantized = fxquant.compile(model, recipe=recipe, backend=backend, calibrate=calibrate(model), measure=0)
    fxquant.save(quantized, tmp_path / "model")
    assert rewrite_history(tmp_path / "model").steps[-1].nodes == rewrite_history(quantized).steps[-1].nodes


def test_steps(quantized: GraphModel, history: History) -> None:
    names = [step.name for step in history.steps]
    assert names[:3] == ["captured", "remove-no-ops", "assign-precision"] and names[-1] == "lower"
    assert [step.phase for step in history.steps][:4] == ["capture", "prepare", "prepare", "convert"]
    assert history.step("shift-channels").stage == "transformed"
    assert history.step("lower").text == "fake-quant"
    times = {entry["pass"]: entry["seconds"] for entry in quantized.plan.passes}
    assert {step.text: step.seconds for step in history.steps if step.seconds is not None} == times
    assert names[1:-1] == [entry["pass"].partition("{")[0] for entry in quantized.plan.passes]


def test_changes_add_up(history: History) -> None:
    for before, after in zip(history.steps, history.steps[1:], strict=False):
        names = {state.name for state in before.nodes}
        assert names - set(after.change.removed) | set(after.change.added) == {s.name for s in after.nodes}
        assert bool(after.edits) >= bool(after.change.added or after.change.removed or after.tensors)


def test_a_factor_is_followed_to_its_weights(history: History) -> None:
    balanced = [change for change in history.step("balance-channels").tensors if change.what == "folded"]
    (change,) = [change for change in balanced if change.layers == (OUT,)]
    assert (change.tensor, change.along) == (f"{OUT}.weight", "columns")
    absorbed = [change for change in history.step("absorb-affines").tensors if change.layers == (VALUE,)]
    weight = next(change for change in absorbed if change.tensor.endswith(".weight"))
    assert weight.along == "rows"
    assert weight.factor == pytest.approx((1 / change.factor[1], 1 / change.factor[0]))
    assert str(weight).startswith(f"{VALUE}.weight: folded times {weight.factor[0]:.3g}..")


def test_shifts_have_ranges_where_the_plan_holds_them(history: History) -> None:
    moved = {change.tensor: change for change in history.step("absorb-shifts").tensors}
    assert moved[f"{VALUE}.bias"].shift is not None
    product = next(change for change in history.step("shift-channels").tensors if change.tensor == f"{VALUE}.bias")
    assert (product.what, product.shift) == ("folded", None)  # It is W z, and there are no weights.


def test_a_node_says_where_it_comes_from(history: History) -> None:
    node = next(s for s in history.steps[-1].nodes if s.roles.get(VALUE) == "product")
    assert (node.kind, node.target, node.dtype) == ("call", "fxquant::linear", "float32")
    assert node.shape == ("B", 16, 16)
    assert (node.module, node.module_class) == (VALUE, "torch.nn.modules.linear.Linear")
    assert node.source.startswith("diffusers/models/attention_processor.py:")
    assert node.made_by[-1][0] == "quantize-linears"
    assert (node.bits, node.arguments["w_format"]) == (8, "int8")
    assert node.arguments["wq"] == "%" + node.inputs[3]
    codes = next(s for s in history.steps[-1].nodes if s.roles.get(VALUE) == "quantize")
    assert codes.bits == 8


def test_what_replaced_a_node(history: History) -> None:
    step = history.step("quantize-linears")
    old = next(s for s in history.step("absorb-affines").nodes if s.roles.get(OUT) == "product")
    (new,) = step.change.replaced[old.name]
    assert step.node(new).roles[OUT] == "product"
    assert old.name in step.change.removed and new in step.change.added


def test_rewired_nodes_show_what_changed(history: History) -> None:
    rewired = {entry.node: entry for entry in history.step("balance-channels").change.rewired}
    product = next(s for s in history.step("balance-channels").nodes if s.roles.get(OUT) == "product")
    entry = rewired[product.name]
    assert list(entry.before) == list(entry.after) == ["input"]
    assert entry.after["input"].endswith("_balanced")


def test_nodes_that_stay_are_shared(history: History) -> None:
    before, after = (history.step(name).nodes for name in ("quantize-linears", "quantize-convolutions"))
    assert all(left is right for left, right in zip(before, after, strict=True))


def test_json_is_complete(history: History) -> None:
    data = json.loads(json.dumps(history.to_json(), allow_nan=False))
    assert data["format"] == 1 and len(data["steps"]) == len(history.steps)
    for step, entry in zip(history.steps, data["steps"], strict=True):
        assert [data["nodes"][number]["name"] for number in entry["order"]] == [state.name for state in step.nodes]
        assert entry["added"] == list(step.change.added)
    distinct = {id(state) for step in history.steps for state in step.nodes}
    assert len(data["nodes"]) == len(distinct)


def test_a_further_graph() -> None:
    model = make_dit(layers=1, sample_size=8)

    def both() -> None:
        calibrate(model)()
        run(model, size=4)

    quantized = fxquant.compile(model, recipe="rtn-w8a8", calibrate=both, measure=0)
    found = rewrite_history(quantized, graph=1)
    assert (found.graph, found.graphs) == (1, 2)
    names = [node.name for node in quantized.graphs[1].graph.nodes]
    assert [state.name for state in found.steps[-2].nodes] == names
    together = rewrite_histories(graphs_of(quantized), [0, 1])
    for one, alone in zip(together, (rewrite_history(quantized), found), strict=True):
        assert (one.graph, one.call) == (alone.graph, alone.call)
        assert [(step.name, step.nodes, step.tensors) for step in one.steps] == [
            (step.name, step.nodes, step.tensors) for step in alone.steps
        ]
    with pytest.raises(ConfigurationError, match="there is no graph 2; calibration captured graphs 0 to 1"):
        rewrite_history(quantized, graph=2)


class TestRefusals:
    def test_unknown_step(self, history: History) -> None:
        with pytest.raises(UnknownNameError, match=r"unknown step 'absorb'\. Known: .*absorb-affines"):
            history.step("absorb")

    def test_plan_without_model(self, quantized: GraphModel) -> None:
        with pytest.raises(ConfigurationError, match="a plan alone has no graph"):
            rewrite_history(quantized.plan)

    def test_float_model(self) -> None:
        with pytest.raises(ConfigurationError, match="can be inspected, not a DiTTransformer2DModel"):
            rewrite_history(make_dit())

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="there is no folder"):
            rewrite_history(tmp_path / "nowhere")
