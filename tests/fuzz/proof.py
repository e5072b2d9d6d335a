"""Rewrite a graph and compare: for everything that the walk grants, the outputs stay the same in float64."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.errors import CalibrationError, NonFiniteError
from fxquant.ir.ops import recording
from fxquant.ir.stages import Stage
from fxquant.ir.tensors import copy_graph, read_tensors, set_tensor
from fxquant.pipeline.pipeline import Pipeline
from fxquant.planning.context import PassContext
from fxquant.planning.plan import Plan
from fxquant.statistics.collection import Statistics
from tests.fuzz.builder import Builder
from tests.support import outputs

CALIBRATED = (900.0, 500.0, 300.0, 100.0)
TIMESTEPS = ((900.0,), (500.0,), (100.0,), (700.0, 0.0), (300.0, 999.0))
"""Timesteps of the compared calls: calibrated ones, and batches that mix others, also on a boundary and outside."""

BAR = 1e-12
"""Largest allowed error, relative to the largest element of an output."""

NEXT_TO_NOTHING = 1e-3
"""Smaller outputs are compared as if they were this large: for inputs near 1, they result from cancellation."""


class SenselessError(Exception):
    """A drawn graph or model does not allow a comparison."""


@dataclass
class Census:
    """Counts over many proofs, which show that the proofs covered something.

    Attributes:
        graphs: Number of compared graphs.
        rewritten: Number of graphs that the passes changed.
        ill: Number of graphs with outputs that rounding the parameters changes by more than a hundredth of the bar.
        ops: Ops of all graphs.
        edits: Number of edits of each pass.
    """

    graphs: int = 0
    rewritten: int = 0
    ill: int = 0
    ops: Counter[Any] = field(default_factory=Counter)
    edits: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        edits = ", ".join(f"{name} {number}" for name, number in sorted(self.edits.items()) if number)
        return f"{self.graphs} graphs, {self.rewritten} rewritten, {self.ill} ill-conditioned; edits: {edits}"


@functools.cache
def parsed(passes: str) -> Pipeline:
    """A pipeline, cached because parsing is slow."""
    return Pipeline.parse(passes)


def prove(
    b: Builder,
    passes: str,
    before: str = "remove-no-ops,assign-precision",
    replayed: bool = True,
    census: Census | None = None,
) -> None:
    """Assert that the rewritten graph computes the same as before, and that a second run of the passes changes nothing.

    Args:
        b: Builder of a finished graph.
        passes: Pipeline text.
        before: Passes before calibration.
        replayed: Whether to also apply the plan to the original graph without statistics, as loading a checkpoint does.
        census: Counts the graph.

    Raises:
        SenselessError: If the graph allows no comparison.
    """
    census = census or Census()
    module = b.module
    calls = [b.inputs(*steps) for steps in TIMESTEPS]
    expected = [computed(module, tensors) for tensors in calls]
    largest = max((float(x.abs().max()) for xs in expected for x in xs if x.numel()), default=0.0)
    if not largest < 1e6:  # This is also true for NaN.
        raise SenselessError("the outputs grow without bound")
    moved = perturbed(module)
    bars = [bar(computed(moved, tensors), right) for tensors, right in zip(calls, expected, strict=True)]
    if max(bars) >= 100 * BAR:
        raise SenselessError("the outputs have no digits to compare")
    census.ill += max(bars) > BAR
    census.ops.update(node.target if node.op == "call_function" else node.op for node in module.graph.nodes)
    context = calibrated(b, before)
    original = copy_graph(module) if replayed else None
    records = parsed(passes).run(module, context)
    for record in records:
        census.edits[record.text.partition("{")[0]] += record.edits
    census.graphs += 1
    census.rewritten += any(record.edits for record in records)
    for tensors, right, most in zip(calls, expected, bars, strict=True):
        assert error(computed(module, tensors), right) <= most
    held = {name: tensor.clone() for name, tensor in read_tensors(module).items()}
    again = parsed(passes).run(module, context, Stage.TRANSFORMED)
    assert not any(record.edits for record in again), f"a second run makes edits: {[str(r) for r in again if r.edits]}"
    assert all(torch.equal(tensor, held[name]) for name, tensor in read_tensors(module).items())
    if original is not None:
        parsed(passes).run(original, PassContext(context.plan, shared=context.shared))
        assert original.code == module.code, "carrying out the plan makes another graph"
        assert all(map(torch.equal, computed(original, calls[0]), computed(module, calls[0])))


def computed(module: fx.GraphModule, tensors: list[Tensor]) -> list[Tensor]:
    """The outputs, with the same dropout each time."""
    torch.manual_seed(0)
    return outputs(module, *tensors)


def calibrated(b: Builder, before: str) -> PassContext:
    """A plan with statistics of a few timesteps, after the passes before calibration."""
    plan = Plan("", "", "timestep")
    parsed(before).run(b.module, plan)
    observed, statistics = copy_graph(b.module), Statistics(num_rows=8)
    layers = plan.layers.items()
    weight_only = ";".join(name for name, layer in layers if layer.weight_bits and layer.activation_bits is None)
    parsed(f"insert-observers{{weight_only={weight_only}}}" if weight_only else "insert-observers").run(observed, plan)
    try:
        with recording(statistics.record), torch.no_grad():
            for step in CALIBRATED:
                observed(*b.inputs(step))
    except CalibrationError as refusal:
        raise SenselessError("not all that is observed has the batch in front") from refusal
    except NonFiniteError as refusal:
        raise SenselessError("a linear reads what float32 cannot hold") from refusal
    return PassContext(plan, statistics)


def perturbed(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph with parameters changed by about half a unit in the last place."""
    moved = copy_graph(module)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in read_tensors(module).items():
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * 2 - 1
            set_tensor(moved, name, tensor * (1 + noise * torch.finfo(torch.float64).eps))
    return moved


def bar(moved: list[Tensor], right: list[Tensor]) -> float:
    """The allowed error of outputs: a hundred times the effect of rounding the parameters, but at least BAR.

    Random graphs need not be meaningful, and some are ill-conditioned: for example, they divide a difference of nearly
    equal numbers by another one. No rewrite can preserve digits that the outputs do not have.
    """
    return max(BAR, 100 * error(moved, right))


def error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference, relative to the largest element of its output."""
    return max(
        (
            float((a - e).abs().max() / e.abs().max().clamp_min(NEXT_TO_NOTHING))
            for a, e in zip(actual, expected, strict=True)
            if e.numel()
        ),
        default=0.0,
    )
