"""Helpers for tests of the core: capture a module, print its graph, request factors and absorb them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.capture.graph import CapturedGraph
from fxquant.capture.trace import Architecture
from fxquant.channels.solution import Grant, Request, Seed, Solution
from fxquant.channels.walk import solve
from fxquant.channels.wants import Cost
from fxquant.ir.meta import LAYER
from fxquant.ir.printing import graph_text as text
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.stages import SPECS, Stage, verify
from fxquant.ir.tensors import bind, weights_of
from fxquant.passes.absorb_affines import AbsorbAffines
from fxquant.passes.absorb_shifts import AbsorbShifts
from fxquant.pipeline.pipeline import PassRecord, Pipeline
from fxquant.planning.context import PassContext
from fxquant.planning.plan import Plan

AFFINE = torch.ops.fxquant.channel_affine.default


def captured(model: nn.Module, *args: Any, timestep_name: str | None = None, **kwargs: Any) -> CapturedGraph:
    """The graph of ``model`` for this call, bound to the model's own tensors."""
    model = model.eval()
    architecture = Architecture.of(model, timestep_name)
    found = architecture.capture(architecture.canonical(args, kwargs))
    bind(found.module, weights_of(model))
    return found


def outputs(module: fx.GraphModule, *inputs: Tensor) -> list[Tensor]:
    """All outputs of a graph."""
    with torch.no_grad():
        return list(module(*inputs))


def relative_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference against the largest element, over all outputs."""
    return max(
        float((a - e).abs().max() / e.abs().max().clamp_min(1e-300)) for a, e in zip(actual, expected, strict=True)
    )


def count(module: fx.GraphModule, target: Any) -> int:
    """Number of calls of an op."""
    return sum(node.target is target for node in module.graph.nodes)


def nodes_of(module: fx.GraphModule, target: Any) -> list[fx.Node]:
    """The calls of an op, in order."""
    return [node for node in module.graph.nodes if node.target is target]


def layer_node(module: fx.GraphModule, name: str) -> fx.Node:
    """The linear, convolution or embedding of a stable name."""
    return next(node for node in module.graph.nodes if node.meta.get(LAYER) == name)


# --- golden text ----------------------------------------------------------------------------------------------------


def golden(body: str) -> str:
    """A text in the body of a test, without its indentation."""
    return textwrap.dedent(body).strip()


# --- factors --------------------------------------------------------------------------------------------------------


@dataclass
class Absorbed:
    """The result of a request for factors.

    Attributes:
        module: The graph after absorb-affines.
        grants: The grants of the walk, by layer.
        groups: Layers that are decided together.
        left: Number of runtime multiplications in the graph.
        error: Largest relative difference of the outputs against the captured graph.
        record: The record of absorb-affines.
        factors: The requested factors, by layer.
    """

    module: fx.GraphModule
    grants: Mapping[str, Grant]
    groups: list[list[str]]
    left: int
    error: float
    record: PassRecord
    factors: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def grant(self) -> Grant:
        """The only grant."""
        (grant,) = self.grants.values()
        return grant


def absorb(
    model: nn.Module,
    *args: Any,
    at: Sequence[str] = ("last",),
    force: bool = False,
    spread: bool = False,
    **kwargs: Any,
) -> Absorbed:
    """Request random factors at the inputs of linears, absorb them, and compare in float64.

    Args:
        model: Converted to float64 in place.
        args: Inputs of one call, float64.
        at: Stable names of the linears.
        force: Request factors on every channel, even where the walk does not grant them.
        spread: With ``force``: different factors for each linear.
        kwargs: Inputs by keyword.
    """
    found = captured(model.double(), *args, **kwargs)
    module = found.module
    inputs = [leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, Tensor)]
    torch.manual_seed(0)  # Seeds dropout.
    expected = outputs(module, *inputs)
    seeds = seeds_at(module, at)
    solution = solve(module.graph, seeds)
    factors = random_factors(solution, seeds, force, spread)
    request(module, seeds, factors)
    verify(module, SPECS[Stage.TRANSFORMED])
    step = Pipeline([AbsorbAffines()])
    (record,) = step.run(module, Plan("", "", None), Stage.TRANSFORMED)
    torch.manual_seed(0)
    error = relative_error(outputs(module, *inputs), expected)
    before = text(module)
    (again,) = step.run(module, Plan("", "", None), Stage.TRANSFORMED)
    assert (again.edits, text(module)) == (0, before), "a second run changed the graph"
    return Absorbed(module, solution.grants, solution.groups(), count(module, AFFINE), error, record, factors)


def absorb_shift(model: nn.Module, *args: Any, at: str = "last", **kwargs: Any) -> Absorbed:
    """Request a constant shift of all channels at the input of a linear, absorb it, and compare in float64.

    Args:
        model: Has an input called ``timestep``; converted to float64 in place.
        args: Inputs of one call, float64.
        at: Stable name of the linear.
        kwargs: Inputs by keyword.
    """
    found = captured(model.double(), *args, **kwargs)
    module, inputs = found.module, [leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, Tensor)]
    torch.manual_seed(0)  # Seeds dropout.
    expected = outputs(module, *inputs)
    (seed,) = seeds_at(module, [at])
    solution = solve(module.graph, [seed], request=Request.STATIC_SHIFT)
    classes = torch.from_numpy(solution.grants[at].classes)
    table = 1 + torch.rand(int(classes.max()) + 1, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    shift = table[classes]  # Also on channels that are not granted.
    rewriter, (reader,) = Rewriter(module, "request"), seed.readers
    with rewriter.before(reader):
        one = rewriter.constant("one", torch.ones(1, dtype=torch.float64), [seed.value])
        rows = rewriter.constant("shift", shift.reshape([1] * (seed.value.meta["val"].dim() - 1) + [-1]), [seed.value])
        shifted = rewriter.call(AFFINE, (seed.value, one, rows), [seed.value], name="shifted")
    rewriter.redirect(reader, seed.value, shifted)
    weight = rewriter.tensor(reader.args[1])
    rewriter.fold(reader, "bias", lambda bias: bias - weight @ shift)
    module.recompile()
    (record,) = Pipeline([AbsorbShifts()]).run(module, Plan("", "", "timestep"), Stage.TRANSFORMED)
    torch.manual_seed(0)
    error = relative_error(outputs(module, *inputs), expected)
    return Absorbed(module, solution.grants, solution.groups(), count(module, AFFINE), error, record)


def seeds_at(module: fx.GraphModule, names: Sequence[str]) -> list[Seed]:
    """The values that these linears read, each with the linears that read it."""
    readers: dict[fx.Node, list[fx.Node]] = {}
    for name in names:
        node = layer_node(module, name)
        readers.setdefault(node.args[0], []).append(node)  # type: ignore[arg-type]
    return [Seed(nodes[0].meta[LAYER], value, tuple(nodes)) for value, nodes in readers.items()]


def random_factors(solution: Solution, seeds: Sequence[Seed], force: bool, spread: bool) -> dict[str, Tensor]:
    """One factor from 0.5 to 2 per class of channels; 1 where no factor is granted, unless forced."""
    generator = torch.Generator().manual_seed(7)

    def draw(size: int) -> Tensor:
        return torch.rand(size, generator=generator, dtype=torch.float64) * 1.5 + 0.5

    if force:
        one = draw(max(seed.channels for seed in seeds))
        return {seed.name: draw(seed.channels) if spread else one[: seed.channels] for seed in seeds}
    table = draw(1 + max(int(grant.classes.max()) for grant in solution.grants.values()))
    table[0] = 1.0
    return {seed.name: table[torch.from_numpy(solution.grants[seed.name].classes)] for seed in seeds}


def request(module: fx.GraphModule, seeds: Sequence[Seed], factors: Mapping[str, Tensor]) -> None:
    """Multiply values by their factors at run time, and divide the weight columns of their readers by the factors."""
    rewriter = Rewriter(module, "request")
    for seed in seeds:
        factor = factors[seed.name]
        with rewriter.before(seed.readers[0]):
            scale = rewriter.constant(f"{seed.name}.factor", factor, [seed.value])
            scaled = rewriter.call(AFFINE, (seed.value, scale, None), [seed.value], name=f"{seed.value.name}_scaled")
        for reader in seed.readers:
            rewriter.redirect(reader, seed.value, scaled)
            rewriter.fold(reader, "weight", lambda w, factor=factor: w.double() / factor)  # type: ignore[misc]
    module.recompile()


def proved(result: Absorbed, cost: Cost = Cost.FREE, into: Sequence[str] | None = None) -> None:
    """Assert that all factors were absorbed exactly, at this cost."""
    assert result.error < 1e-12
    for grant in result.grants.values():
        assert grant.granted.all(), grant.reason
        assert grant.cost is cost
        assert grant.reason is None
    assert result.record.edits
    if cost is Cost.FREE:
        assert result.left == 0
    if into is not None:
        assert list(result.grant.into) == list(into)


def refused(result: Absorbed, reason: str) -> None:
    """Assert that no factor was granted, for this reason; forced factors stay in the graph, nothing else changes."""
    assert result.error < 1e-12
    for grant in result.grants.values():
        assert not grant.granted.any()
        assert grant.cost is Cost.NOT
        assert grant.into == ()
        assert grant.reason is not None
        assert reason in grant.reason, grant.reason
    assert result.record.edits == 0
    assert result.left == len(result.grants)


def rewritten(
    model: nn.Module, passes: str, plan: PassContext | Plan | None = None, **inputs: Tensor
) -> tuple[str, str]:
    """Text of the graph before and after a pipeline."""
    module = captured(model, **inputs).module
    before = text(module)
    Pipeline.parse(passes).run(module, plan or Plan("", "", "timestep"))
    return before, text(module)
