"""Attention quantized in whole models: ranges that follow balancing, checkpoints, compilers, other calls."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxquant
from fxquant.backends.fake_quant import FakeQuant
from fxquant.calibration.calibrate import Calibration, run_calibration
from fxquant.capture.trace import Architecture
from fxquant.errors import BackendError, CalibrationError, ConfigurationError
from fxquant.ir.ops import recording
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.stages import Stage, StageSpec
from fxquant.ir.tensors import copy_graph
from fxquant.numerics.sqnr import sqnr_db
from fxquant.passes.insert_observers import InsertObservers
from fxquant.pipeline.pipeline import Pipeline
from fxquant.pipeline.recipes import Recipe, make_recipe
from fxquant.planning.context import PassContext
from fxquant.planning.decisions import AttentionPlan
from fxquant.planning.plan import Plan
from fxquant.runtime.model import GraphModel
from fxquant.statistics.collection import Statistics
from tests import tiny
from tests.support import count
from tests.zoo.models import CAPTURED, Entry

MATMUL = torch.ops.fxquant.matmul.default
STEPS = (900.0, 500.0, 100.0)


def entry(name: str) -> Entry:
    return next(one for one in CAPTURED if one.id == name)


@torch.no_grad()
def run(model: nn.Module, call: dict[str, Any]) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = model(**call)
    return next(leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor))


def calibrating(one: Entry, model: nn.Module) -> Any:
    return lambda: [run(model, one.call(step=step, seed=seed)) for seed, step in enumerate(STEPS)]


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        pytest.param("DiT2D", "ptq4dit-w8a8", marks=pytest.mark.exhaustive),
        ("SD32D", "ptq4dit-w8a8"),
        pytest.param("PixArt2D-Sigma", "repq-w8a8", marks=pytest.mark.exhaustive),
        ("OwnDiT", "htg-w8a8"),
        pytest.param("SD32D", "htg-w8a8", marks=pytest.mark.exhaustive),
    ],
)
def test_the_range_of_v_is_that_of_the_balanced_v(name: str, recipe: str) -> None:
    """Balancing and shifting change v after calibration saw it; its range must be that of what it has become."""
    one = entry(name)
    model, chosen = one.model(torch.float64), make_recipe(recipe, "all")
    plan = Plan("", "", one.timestep)
    calibration = Calibration(
        model, Architecture.of(model, one.timestep), plan, chosen.prepare, chosen.convert, 0, (), Statistics()
    )
    run_calibration(
        calibration,
        model,
        lambda: [run(model, one.call(step=s, seed=i, dtype=torch.float64)) for i, s in enumerate(STEPS)],
    )
    context = PassContext(plan, calibration.statistics)
    (captured,) = calibration.prepared
    first = next(number for number, step in enumerate(chosen.convert) if step.name.startswith("quantize"))
    Pipeline(chosen.convert[:first]).run(captured.module, context)
    now = watched(calibration, [one.call(step=s, seed=i, dtype=torch.float64) for i, s in enumerate(STEPS)])
    Pipeline.parse("quantize-attention").run(captured.module, context, Stage.TRANSFORMED)
    assert plan.attentions
    changed = False
    for attention in plan.attentions.values():
        assert attention.bits == 8, attention.reason
        for side in ("k", "v"):
            ends, seen = attention.ranges[side], now[attention.observed[side]]
            bounds = min(float(seen.minimum.min()), 0.0), max(float(seen.maximum.max()), 0.0)
            assert (ends.low, ends.high) == pytest.approx(bounds, rel=1e-5)
        before = calibration.statistics[attention.observed["v"]].maximum.max()
        changed = changed or abs(float(before) - attention.ranges["v"].high) > 1e-3
    assert changed, "nothing changed v, so this proves nothing"


def watched(calibration: Calibration, calls: list[dict[str, Any]]) -> Statistics:
    """Statistics of q, k and v in a transformed graph that is still float."""
    (captured,), plan = calibration.prepared, calibration.plan
    module, statistics = copy_graph(captured.module), Statistics()
    other = Plan("", "", plan.timestep, attentions={name: AttentionPlan(8) for name in plan.attentions})
    other.layers = {name: replace(layer, activation_bits=None) for name, layer in plan.layers.items()}
    InsertObservers().run(module.graph, PassContext(other), Rewriter(module, "watch"))
    module.recompile()
    for call in calls:
        leaves = calibration.architecture.canonical((), call).leaves
        with recording(statistics.record), torch.no_grad():
            module(*captured.inputs(leaves))
    return statistics


MODELS = [
    "OwnDiT",
    *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("SD32D", "PixArt2D-Sigma", "Flux2D")),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_whole_models_at_other_sizes(name: str) -> None:
    one = entry(name)
    model = one.model()
    quantized = fxquant.compile(
        model, recipe="ptq4dit-w8a8", layers="all", calibrate=calibrating(one, model), timestep=one.timestep, measure=0
    )
    assert quantized.plan is not None
    assert all(attention.bits == 8 for attention in quantized.plan.attentions.values())
    assert count(quantized.graphs[0], MATMUL) == 2 * len(quantized.plan.attentions)
    for options in ({"batch": 3}, {"size": one.other_size, "prompt": one.other_prompt}):
        call = one.call(seed=7, step=500.0, **options)
        assert sqnr_db(run(model, call), run(quantized, call)) > 15, options


def quantized_dit(**options: Any) -> GraphModel:
    model = tiny.make_dit()
    return fxquant.compile(model, recipe="ptq4dit-w8a8", layers="all", calibrate=tiny.calibrate(model), **options)


@pytest.mark.parametrize("bits", [8, 4])
def test_attention_alone_costs_what_its_grids_cost(bits: int) -> None:
    model = tiny.make_dit(layers=2)
    recipe = Recipe.parse(
        f"assign-precision{{precision=w8a8 attention=quantized overrides=*attn1=w8a{bits};*=float}} ; "
        "quantize-linears,quantize-attention"
    )
    quantized = fxquant.compile(model, recipe=recipe, calibrate=tiny.calibrate(model))
    found = sqnr_db(tiny.run(model), tiny.run(quantized))
    assert (45 < found < 80) if bits == 8 else (20 < found < 60), found


@pytest.mark.slow
def test_saved_loaded_and_replayed_it_is_the_same(tmp_path: Path) -> None:
    model = tiny.make_dit()
    first = fxquant.compile(model, recipe="ptq4dit-w8a8", layers="all", calibrate=tiny.calibrate(model))
    expected = tiny.run(first)
    fxquant.save(first, tmp_path / "q")
    loaded = fxquant.load(tmp_path / "q")
    assert torch.equal(tiny.run(loaded), expected)
    assert loaded.plan is not None and first.plan is not None
    assert loaded.plan.attentions == first.plan.attentions
    assert torch.equal(tiny.run(fxquant.compile(model, plan=first.plan)), expected)
    # A call of another size captures a further graph, which takes its ranges from the plan.
    other = tiny.run(first, size=4)
    assert torch.equal(tiny.run(loaded, size=4), other)
    assert [count(graph, MATMUL) for graph in loaded.graphs] == [2, 2]


def test_an_edited_plan_keeps_an_attention_in_float() -> None:
    model = tiny.make_dit(layers=2)
    plan = fxquant.compile(model, recipe="rtn-w8a8", layers="all", calibrate=tiny.calibrate(model)).plan
    assert plan is not None
    plan.attentions["transformer_blocks.1.attn1"].bits = None
    assert count(fxquant.compile(model, plan=plan).graphs[0], MATMUL) == 2
    plan.attentions["transformer_blocks.0.attn1"].bits = 9
    with pytest.raises(ConfigurationError, match=r"attention transformer_blocks.0.attn1: 9 bits"):
        fxquant.compile(model, plan=plan)


def test_plans_without_attentions_load() -> None:
    model = tiny.make_dit()
    plan = fxquant.compile(model, recipe="rtn-w8a8", calibrate=tiny.calibrate(model)).plan
    assert plan is not None
    data = plan.to_json()
    assert Plan.from_json(json.loads(json.dumps(data)), plan.vectors) == plan
    del data["attentions"]
    data["recipe"] = data["recipe"].replace("quantize-attention{activation-range=percentile},", "")
    old = Plan.from_json(data, plan.vectors)
    assert old.attentions == {}
    assert count(fxquant.compile(model, plan=old).graphs[0], MATMUL) == 0


def test_an_attention_that_calibration_never_reached() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = tiny_attention(), tiny_attention()
            self.config = {}

        def forward(self, x: Tensor, timestep: Tensor, more: Tensor | None = None) -> Tensor:
            y = self.first(x)
            return y if more is None else y + self.second(more)

    model = Twice().eval()
    x, timestep = torch.randn(2, 5, 8), torch.tensor([3.0, 7.0])
    quantized = fxquant.compile(model, recipe="rtn-w8a8", layers="all", calibrate=lambda: model(x, timestep))
    assert list(quantized.plan.attentions) == ["first"]
    with pytest.raises(CalibrationError, match="the plan knows no attention 'second'"):
        quantized(x, timestep, x)


def tiny_attention() -> nn.Module:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    return Attention()


@pytest.mark.slow
def test_compiles_and_exports_as_one_graph() -> None:
    quantized = quantized_dit(measure=0)
    inputs, expected = tiny.inputs(), tiny.run(quantized)
    torch._dynamo.reset()
    compiled = torch.compile(quantized, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(**inputs).sample, expected)
    exported = torch.export.export(quantized.graphs[0], tuple(inputs.values()))
    assert sum(node.target is MATMUL for node in exported.graph.nodes) == 2
    assert torch.equal(exported.module()(*inputs.values())[0], expected)


def test_the_report_lists_attentions() -> None:
    report = fxquant.report(quantized_dit(measure=0))
    (row,) = report.attentions
    assert (row.name, row.bits, row.softmax_bits) == ("transformer_blocks.0.attn1", 8, 8)
    assert row.kernel == "fxquant::matmul (reference)"
    assert row.ranges.keys() == row.sqnr_db.keys() == {"q", "k", "v"}
    assert "a8, softmax 8" in str(report)
    assert report.to_json()["attentions"][0]["bits"] == 8
    model = tiny.make_dit()
    kept = fxquant.report(fxquant.compile(model, recipe="rtn-w8a8", calibrate=tiny.calibrate(model), measure=0))
    assert "the recipe keeps attention in float" in str(kept)
    assert kept.attentions[0].kernel == "aten float"


def test_a_backend_without_the_product_refuses() -> None:
    class Plain(FakeQuant):
        name = "plain"
        spec = StageSpec("plain", frozenset({"quantize", "linear", "conv2d", "dequantize_weight"}))

    model = tiny.make_dit()
    with pytest.raises(BackendError, match=r"transformer_blocks.0.attn1.*keep attention float"):
        quantized_dit(backend=Plain())
    assert fxquant.compile(model, recipe="rtn-w8a8", backend=Plain(), calibrate=tiny.calibrate(model))
