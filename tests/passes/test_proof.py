"""One proof for every registered pass, chosen by its tier. A pass without an example here fails.

The pass matches; the output keeps its bits (exact), is equal in real arithmetic (algebraic) or within the stated bound
(lossy); its text parses back to it; every new node says where it comes from; the graph verifies; a second run changes
nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.capture.graph import CapturedGraph
from fxquant.errors import ConfigurationError
from fxquant.ir.meta import PROVENANCE
from fxquant.ir.ops import recording
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.stages import SPECS, Stage, verify
from fxquant.ir.tensors import copy_graph, read_tensors
from fxquant.numerics.formats import Scales
from fxquant.numerics.sqnr import sqnr_db
from fxquant.numerics.weights import dequantize_weight
from fxquant.pipeline.pipeline import PASSES, Pass, Pipeline, Tier, parse_pass
from fxquant.planning.context import PassContext
from fxquant.planning.plan import Plan
from fxquant.statistics.collection import Statistics
from fxquant.testing import own_passes
from tests.support import captured, count, outputs, relative_error, text

C = 16
PLAN_ONLY = (
    "assign-precision",
    "bin-bits",
    "bin-ranges",
    "choose-variants",
    "group-timesteps",
    "observe-step",
    "reconstruct-blocks",
    "weigh-timesteps",
)
"""Passes that decide and leave the graph as it is."""

SQNR_AT_8_BITS = 30.0
"""dB: a uniform grid of 255 steps over the range of a normal variable leaves about 40."""


class Block(nn.Module):
    """A patch convolution, a table, an adaLN, attention and a gated feed-forward: something for every pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv2d(3, C, 2, stride=2)
        self.table = nn.Embedding(10, C)
        self.modulation = nn.Linear(C, 2 * C)
        self.blocks = nn.ModuleList([nn.ModuleDict({n: nn.Linear(C, C) for n in ("q", "k", "v", "out", "gate", "up")})])
        self.last = nn.Linear(C, 4)

    def forward(self, sample: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        x = self.patch(sample).flatten(2).transpose(1, 2)
        condition = self.table(labels) + timestep[:, None].to(x.dtype) / 1000
        scale, shift = self.modulation(F.silu(condition))[:, None].chunk(2, -1)
        (block,) = self.blocks
        y = F.layer_norm(x, (C,)) * (1 + scale) + shift
        q, k, v = (block[name](y).unflatten(-1, (2, -1)).transpose(1, 2) for name in ("q", "k", "v"))
        x = x + block["out"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = F.dropout(x[:, :], 0.1, self.training).to(x.dtype)
        return self.last(F.silu(block["gate"](x)) * block["up"](x))


def inputs(dtype: torch.dtype, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(batch)
    return torch.randn(batch, 3, 8, 8, dtype=dtype), torch.randint(0, 1000, (batch,)), torch.randint(0, 10, (batch,))


@dataclass(frozen=True)
class Example:
    """How to try a pass.

    Attributes:
        before: Pipeline text that brings the graph to where the pass runs.
        options: Of the pass, to print and parse.
        prepare: Anything else that the graph or the plan needs.
        stage: Stage of the graph there.
        run_with: Options with which it runs, where it takes long with its own.
    """

    before: str = ""
    options: str = ""
    prepare: Callable[[CapturedGraph, PassContext], None] = lambda found, context: None
    stage: Stage = Stage.CAPTURED
    run_with: str = ""


def calibrated(found: CapturedGraph, context: PassContext) -> None:
    observed = copy_graph(found.module)
    Pipeline.parse("insert-observers").run(observed, context.plan)
    context.statistics = Statistics()
    dtype = next(iter(read_tensors(found.module).values())).dtype
    with recording(context.statistics.record):
        outputs(observed, *inputs(dtype, 2))
        outputs(observed, *inputs(dtype, 3))


def with_calls(found: CapturedGraph, context: PassContext) -> None:
    calibrated(found, context)
    dtype = next(iter(read_tensors(found.module).values())).dtype
    context.inputs = [list(inputs(dtype, 2)), list(inputs(dtype, 3))]


def weighed(found: CapturedGraph, context: PassContext) -> None:
    with_calls(found, context)
    Pipeline.parse("bin-ranges{bins=2},weigh-timesteps{calls=1 probes=1}").run(found.module, context)


def balanced(found: CapturedGraph, context: PassContext) -> None:
    calibrated(found, context)
    Pipeline.parse("balance-channels").run(found.module, context)


def grouped(found: CapturedGraph, context: PassContext) -> None:
    calibrated(found, context)
    Pipeline.parse("group-timesteps{groups=3}").run(found.module, context)


def shifted(found: CapturedGraph, context: PassContext) -> None:
    grouped(found, context)
    Pipeline.parse("shift-channels").run(found.module, context)


EXAMPLES: dict[str, Example] = {
    "absorb-affines": Example("assign-precision", prepare=balanced, stage=Stage.TRANSFORMED),
    "absorb-shifts": Example("assign-precision", prepare=shifted, stage=Stage.TRANSFORMED),
    "assign-precision": Example(
        options="precision=w4a8-g8 layers=all overrides=last=w8a16;blocks.0.q=float attention=quantized"
    ),
    "balance-channels": Example("assign-precision", "exponent=0.3 salience=max dearest=free", calibrated),
    "bin-bits": Example("assign-precision", "bits=5 lowest=3", weighed),
    "bin-ranges": Example("assign-precision", "bins=2", calibrated),
    "choose-variants": Example(
        "assign-precision", "bins=2 clip=False calls=1", with_calls, run_with="calls=1 probes=1"
    ),
    "group-timesteps": Example("assign-precision", "groups=2 method=optimal dearest=free", calibrated),
    "insert-observers": Example("assign-precision{attention=quantized}"),
    "observe-step": Example(options="step=2"),
    "quantize-attention": Example(
        "assign-precision{attention=quantized}", "activation-range=mse softmax-bits=7", calibrated
    ),
    "quantize-convolutions": Example("assign-precision{layers=all}", "weight-range=mse symmetric=True", calibrated),
    "quantize-embeddings": Example("assign-precision"),
    "quantize-linears": Example("assign-precision", "weight-range=percentile activation-range=mse", calibrated),
    "reconstruct-blocks": Example(
        "assign-precision", "iterations=9 samples=8 weight-range=mse", with_calls, run_with="iterations=10"
    ),
    "remove-no-ops": Example(),
    "rotate-channels": Example(
        "assign-precision", "block=4 online=off seed=3 layers=*.out offline=False", run_with="least=4"
    ),
    "shift-channels": Example("assign-precision", "dearest=free", grouped),
    "split-low-rank": Example(
        "assign-precision",
        "rank=3 iterations=2 weighting=importance branch=bfloat16",
        calibrated,
        run_with="rank=2 iterations=1 weighting=importance",
    ),
    "weigh-timesteps": Example("assign-precision", "by=signal calls=3", with_calls, run_with="calls=1 probes=1"),
}

WEIGHT_ONLY = {
    "quantize-convolutions": Example("assign-precision{layers=all precision=w8a16}"),
    "quantize-linears": Example("assign-precision{precision=w8a16}"),
}


def run(name: str, example: Example, dtype: torch.dtype) -> tuple[CapturedGraph, PassContext, list[Tensor], Pass]:
    """The graph after the pass, the context, the outputs of the captured graph, and the pass."""
    found = captured(Block().to(dtype), **dict(zip(("sample", "timestep", "labels"), inputs(dtype), strict=True)))
    context = PassContext(Plan("", "", "timestep"))
    expected = outputs(found.module, *inputs(dtype))
    Pipeline.parse(example.before).run(found.module, context)
    example.prepare(found, context)
    names = {node.name for node in found.module.graph.nodes}
    before = text(found.module)
    step = parse_pass(f"{name}{{{example.run_with}}}")
    (record,) = Pipeline([step]).run(found.module, context, example.stage)
    assert bool(record.edits) == (name not in PLAN_ONLY), "the pass did not match"
    assert (text(found.module) != before) == bool(record.edits)
    for node in found.module.graph.nodes:
        if node.name not in names:
            assert node.meta[PROVENANCE][-1].pass_name == name, node
    stage = max(example.stage, step.establishes)
    verify(found.module, SPECS[stage])
    return found, context, expected, step


def test_every_pass_has_an_example() -> None:
    assert sorted(EXAMPLES) == own_passes()


@pytest.mark.parametrize("name", own_passes())
def test_proof(name: str) -> None:
    tier = PASSES[name].tier
    dtype = torch.float64 if tier is Tier.ALGEBRAIC else torch.float32
    found, context, expected, _ = run(name, EXAMPLES[name], dtype)
    with recording(lambda *_: None):
        actual = outputs(found.module, *inputs(dtype))
    if tier is Tier.EXACT:
        assert all(map(torch.equal, actual, expected))
    elif tier is Tier.ALGEBRAIC:
        assert relative_error(actual, expected) < 1e-12
    else:
        _within_bound(found, context.plan, actual, expected)


@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_proof_for_float_activations(name: str) -> None:
    found, context, expected, _ = run(name, WEIGHT_ONLY[name], torch.float32)
    _within_bound(found, context.plan, outputs(found.module, *inputs(torch.float32)), expected)


def _within_bound(found: CapturedGraph, plan: Plan, actual: list[Tensor], expected: list[Tensor]) -> None:
    assert sqnr_db(expected[0], actual[0]) > SQNR_AT_8_BITS
    tensors, original = read_tensors(found.module), dict(Block().named_parameters())
    quantized = [target.removesuffix("_packed") for target in tensors if target.endswith("_packed")]
    assert quantized or count(found.module, torch.ops.fxquant.matmul.default) == 2
    for target in quantized:
        layer = plan.layers[target.removesuffix(".weight")]
        scale = tensors[f"{target}_scale"]
        values = dequantize_weight(
            tensors[f"{target}_packed"], Scales(scale, tensors[f"{target}_zero_point"]),
            f"int{layer.weight_bits}", layer.group_size, layer.shape[1], torch.float64,
        )  # fmt: skip
        steps = scale.double().repeat_interleave(layer.shape[1] // scale.shape[1], dim=1)
        error = (values - original[target].detach().flatten(1).double()).abs()
        assert (error <= 0.5 * steps * (1 + 1e-6)).all(), target


@pytest.mark.parametrize("name", own_passes())
def test_a_second_run_changes_nothing(name: str) -> None:
    example = EXAMPLES[name]
    found, context, _, step = run(name, example, torch.float32)
    plan = context.plan
    before, decided, vectors = text(found.module), str((plan.layers, plan.attentions)), dict(plan.vectors)
    tensors = {target: tensor.clone() for target, tensor in read_tensors(found.module).items()}
    stage = max(example.stage, step.establishes)
    if stage > step.requires:
        with pytest.raises(ConfigurationError, match=f"this one is {stage} already"):
            Pipeline([step]).run(found.module, context, stage)
        rewriter = Rewriter(found.module, name)
        step.run(found.module.graph, context, rewriter)
        edits = rewriter.edits
    else:
        edits = Pipeline([step]).run(found.module, context, stage)[0].edits
    assert edits == 0
    assert text(found.module) == before
    assert str((plan.layers, plan.attentions)) == decided
    assert plan.vectors.keys() == vectors.keys()
    after = read_tensors(found.module)
    assert all(torch.equal(after[target], tensors[target]) for target in tensors)


@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_a_second_run_with_float_activations_changes_nothing(name: str) -> None:
    found, context, _, step = run(name, WEIGHT_ONLY[name], torch.float32)
    before = text(found.module)
    (record,) = Pipeline([step]).run(found.module, context, Stage.QUANTIZED)
    assert (record.edits, text(found.module)) == (0, before)


@pytest.mark.parametrize("name", own_passes())
def test_text_parses_back(name: str) -> None:
    assert str(parse_pass(name)) == name
    options = EXAMPLES[name].options
    if options:
        step = parse_pass(f"{name}{{{options}}}")
        assert step != parse_pass(name)
        assert parse_pass(str(step)) == step
        assert str(Pipeline.parse(str(Pipeline([step])))) == str(step)


@pytest.mark.parametrize("name", own_passes())
def test_a_pass_that_has_nothing_to_do_leaves_the_graph_alone(name: str) -> None:
    found = captured(nn.Sequential(nn.Tanh()), torch.randn(2, 3))
    before = text(found.module)
    (record,) = Pipeline([parse_pass(name)]).run(found.module, Plan("", "", None))
    assert (record.edits, text(found.module)) == (0, before)


@pytest.mark.parametrize("name", own_passes())
def test_the_docstring_shows_before_and_after(name: str) -> None:
    doc = PASSES[name].__doc__ or ""
    assert name in PLAN_ONLY or ("Before" in doc and "After" in doc)
