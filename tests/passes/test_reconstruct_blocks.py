"""Block reconstruction: it learns, its simulation is what the quantized graph computes, and it can be cut off."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.errors import CalibrationError, ConfigurationError
from fxquant.numerics.sqnr import sqnr_db
from fxquant.pipeline.pipeline import Pipeline, parse_pass
from fxquant.pipeline.recipes import Recipe, make_recipe
from fxquant.planning.context import PassContext
from fxquant.planning.plan import Plan
from fxquant.reconstruction import engine
from fxquant.runtime.model import GraphModel
from tests.passes import test_proof
from tests.support import captured
from tests.tiny import STEPS, make_dit, run

QUICK = {"iterations": 60, "rounding_rate": 0.03, "step_rate": 1e-3, "regularizer": 10.0}


def recipe(name: str = "rtn-reconstruct-w4a8", layers: str = "default", **options: Any) -> Recipe:
    return make_recipe(name, layers).with_options("reconstruct-blocks", **(QUICK | options))


def compiled(model: nn.Module, made: Recipe | str, layers: str = "default", **options: Any) -> GraphModel:
    if isinstance(made, str):
        made = make_recipe(made, layers)

    def calibrate() -> None:
        for seed, step in enumerate(range(50, 1000, 100)):
            run(model, batch=16, timestep=float(step), seed=seed)

    return fxquant.compile(model, recipe=made, calibrate=calibrate, measure=0, **options)


def error_db(quantized: nn.Module, model: nn.Module) -> float:
    pairs = [(run(model, timestep=step, seed=40), run(quantized, timestep=step, seed=40)) for step in STEPS]
    return sqnr_db(*(torch.cat(side) for side in zip(*pairs, strict=True)))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return make_dit(2)


@pytest.fixture(scope="module")
def rounded(model: nn.Module) -> GraphModel:
    """What several tests compare and save; one that changes it takes a copy."""
    return compiled(model, recipe())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "rtn-reconstruct-w4a8",
        "ptq4dit-reconstruct-w3a8-g8",
        pytest.param("htg-reconstruct-w4a8", marks=pytest.mark.exhaustive),
    ],
)
def test_it_comes_closer_to_the_float_model_than_rounding_to_nearest(
    model: nn.Module, rounded: GraphModel, name: str
) -> None:
    learned = rounded if name == "rtn-reconstruct-w4a8" else compiled(model, recipe(name))
    nearest = compiled(model, name.replace("-reconstruct", ""))
    assert error_db(learned, model) > error_db(nearest, model) + 0.2
    found = learned.plan.reconstruction
    for block in ("transformer_blocks.0", "transformer_blocks.1"):
        before, after = found[block]
        assert after > before + 0.3
    assert learned.plan.layers["transformer_blocks.0.attn1.to_q"].activation.method == "learned"


@pytest.mark.parametrize("name", ["rtn-reconstruct-w4a8", "htg-reconstruct-w4a8", "dynamic-reconstruct-w4a8"])
def test_what_it_simulates_is_what_the_quantized_graph_computes(
    model: nn.Module, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    class Watched(engine._Engine):
        def _learn(self, simulation: Any, inputs: Any, targets: Any, advance: Any) -> None:
            super()._learn(simulation, inputs, targets, advance)
            if simulation.segment.name == "transformer_blocks.1":
                (node,) = (node for node in simulation.segment.outputs if node.name.startswith("add"))
                made = simulation.run(inputs[0], self.timesteps[0], engine.as_codes)
                seen.append((self.context.inputs[0], node.name, made[node]))

    monkeypatch.setattr(engine, "_Engine", Watched)
    quantized = compiled(model, recipe(name, "blocks", iterations=5))
    ((tensors, block, simulated),) = seen
    values: dict[str, Any] = {}

    class Record(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            values[n.name] = super().run_node(n)
            return values[n.name]

    with torch.no_grad():
        Record(quantized.graphs[0]).run(*tensors)
    # Beyond rounding, a code or two may fall to the other side of a half.
    assert sqnr_db(values[block], simulated) > 70


@pytest.mark.slow
def test_it_is_kept_in_the_checkpoint(rounded: GraphModel, tmp_path: Path) -> None:
    learned = copy.deepcopy(rounded)
    fxquant.save(learned, tmp_path / "saved")
    loaded = fxquant.load(tmp_path / "saved")
    assert torch.equal(run(loaded, seed=3), run(learned, seed=3))
    assert torch.equal(run(loaded, size=4, seed=3), run(learned, size=4, seed=3))  # A further graph.
    assert loaded.plan.reconstruction == learned.plan.reconstruction


def test_a_plan_alone_does_not_hold_what_was_learned(model: nn.Module, rounded: GraphModel) -> None:
    with pytest.raises(CalibrationError, match="load the checkpoint"):
        fxquant.compile(model, plan=rounded.plan)


@pytest.mark.slow
def test_it_goes_on_where_it_was_cut_off(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = recipe(iterations=8)
    whole = compiled(model, short)
    names: list[str] = []
    cut_off_at = ["transformer_blocks.1"]
    learn = engine.learn

    def cut_off(simulation: Any, *arguments: Any) -> Any:
        names.append(simulation.segment.name)
        if simulation.segment.name in cut_off_at:
            cut_off_at.clear()
            raise KeyboardInterrupt
        return learn(simulation, *arguments)

    monkeypatch.setattr(engine, "learn", cut_off)
    with pytest.raises(KeyboardInterrupt):
        compiled(model, short, resume=tmp_path)
    resumed = compiled(model, short, resume=tmp_path)
    assert names.count("transformer_blocks.0") == 1
    assert torch.equal(run(resumed, seed=3), run(whole, seed=3))
    names.clear()
    compiled(model, recipe(iterations=8, seed=1), resume=tmp_path)
    assert names[0] == "transformer_blocks.0"  # Learned otherwise, so anew.


class Optional(nn.Module):
    """A model whose second block runs only in calls with an optional input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in range(2))

    def forward(self, hidden_states: Tensor, timestep: Tensor, more: Tensor | None = None) -> Tensor:
        x = hidden_states + self.blocks[0](hidden_states * timestep[:, None, None] / 1000)
        return x if more is None else x + self.blocks[1](x + more)


def test_blocks_of_all_kinds_of_call_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Optional().eval()
    made = make_recipe("rtn-reconstruct-w4a8", "all").with_options("reconstruct-blocks", iterations=4, batch=4)
    x, names = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(1)), []
    learn = engine.learn

    def watched(simulation: Any, *arguments: Any) -> Any:
        names.append(simulation.segment.name)
        return learn(simulation, *arguments)

    def calibrate() -> None:
        for step in (900.0, 100.0):
            model(x, torch.full((6,), step))
            model(x, torch.full((6,), step), more=x.flip(0))

    def quantized() -> GraphModel:
        return fxquant.compile(model, recipe=made, calibrate=calibrate, measure=0, resume=tmp_path)

    monkeypatch.setattr(engine, "learn", watched)
    first = quantized()
    assert names.count("blocks.0") == 2 and "blocks.1" in names
    names.clear()
    again = quantized()
    assert not names
    given = (x, torch.full((6,), 500.0), x)
    assert torch.equal(again(*given), first(*given))


class Watch:
    """An instrument that shows progress."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, int, int]] = []

    def before(self, *_: Any) -> None: ...
    def after(self, *_: Any) -> None: ...
    def failed(self, *_: Any) -> None: ...
    def progress(self, step: Any, what: str, done: int, total: int) -> None:
        self.seen.append((step.name, what, done, total))


def test_it_tells_how_far_it_is(model: nn.Module, capfd: pytest.CaptureFixture[str]) -> None:
    watch = Watch()
    compiled(model, recipe(iterations=3), instruments=[watch])
    names, parts, done, totals = zip(*watch.seen, strict=True)
    assert set(names) == {"reconstruct-blocks"}
    assert "transformer_blocks.1" in parts
    assert done == tuple(range(1, totals[0] + 1))
    assert capfd.readouterr().err == ""  # Where somebody shows it, the pass itself does not.


def test_where_learning_makes_it_worse_nearest_stays(model: nn.Module) -> None:
    wild = compiled(model, recipe(iterations=3, rounding_rate=100.0))
    nearest = compiled(model, "rtn-w4a8")
    assert all(after == before for before, after in wild.plan.reconstruction.values())
    assert error_db(wild, model) == pytest.approx(error_db(nearest, model), abs=0.2)


def test_what_was_learned_for_one_graph_stays_for_the_next() -> None:
    tensors = dict(zip(("sample", "timestep", "labels"), test_proof.inputs(torch.float32), strict=True))
    found, plan = captured(test_proof.Block(), **tensors), Plan("", "", "timestep")
    context = PassContext(plan)
    Pipeline.parse("assign-precision{precision=w4a8}").run(found.module, plan)
    test_proof.with_calls(found, context)
    step = Pipeline.parse("reconstruct-blocks{iterations=10 step-rate=0.01}")
    step.run(found.module, context)
    learned = {name: layer.activation for name, layer in plan.layers.items() if layer.activation}
    codes = dict(context.codes)
    del context.codes["blocks.0.out"]  # As if only this layer had not been in the first graph.
    step.run(found.module, context)
    assert any(activation.method == "learned" for activation in learned.values())
    assert {name: layer.activation for name, layer in plan.layers.items() if layer.activation} == learned
    assert all(context.codes[name] is codes[name] for name in codes if name != "blocks.0.out")


def test_the_model_stays_as_it_was(model: nn.Module) -> None:
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    compiled(model, recipe(iterations=3))
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert not any(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("options", ["iterations=0", "samples=0", "batch=0", "regularizer=0", "warm-up=1.0"])
def test_options_that_cannot_be(options: str) -> None:
    with pytest.raises(ConfigurationError):
        parse_pass(f"reconstruct-blocks{{{options}}}")
