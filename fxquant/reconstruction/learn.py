"""Learning the roundings and steps of one segment, so that its output is close to the float output."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxquant.numerics.rounding.soft import Hardening, SoftWeight
from fxquant.reconstruction.cache import Values, minibatch, mixable, part_of, pick, taken
from fxquant.reconstruction.segments import Segment
from fxquant.reconstruction.simulate import LearnedSteps, Lookup, TokenSteps, as_it_is, run_segment

if TYPE_CHECKING:
    from fxquant.distributed.team import Team


@dataclass(frozen=True)
class Settings:
    """How a segment is learned.

    Attributes:
        hardening: Number of iterations, and how soft weights become codes by the end.
        batch: Samples per iteration.
        rounding_rate: Learning rate of Adam for roundings.
        step_rate: Learning rate of Adam for steps of activations, as a share of the step; it falls to 0 along a cosine.
        seed: Seed of the minibatches.
    """

    hardening: Hardening
    batch: int = 32
    rounding_rate: float = 1e-3
    step_rate: float = 4e-5
    seed: int = 0


@dataclass(eq=False)
class Simulation:
    """A segment with quantized linears.

    Attributes:
        module: The float graph.
        segment: The part of the graph.
        weights: Soft weights, or tensors that do not change, by the linear that reads them.
        steps: Grids of inputs by the linear that reads them; linears that read one value share one grid.
        bins: By linear, a function that gives the bins of samples from their timesteps; None for one bin.
    """

    module: fx.GraphModule
    segment: Segment
    weights: dict[fx.Node, SoftWeight | Tensor] = field(default_factory=dict)
    steps: dict[fx.Node, LearnedSteps | TokenSteps] = field(default_factory=dict)
    bins: dict[fx.Node, Callable[[Tensor], Tensor] | None] = field(default_factory=dict)

    def run(self, values: Mapping[fx.Node, Any], timesteps: Tensor, how: Callable[[SoftWeight], Tensor]) -> Values:
        """Outputs of the segment.

        Args:
            values: Values of its inputs.
            timesteps: One per sample, or one for all.
            how: Makes a tensor from a soft weight: soft, or hard in one of two ways.
        """
        made: dict[int, Tensor] = {}  # Layers may share a weight.

        def compute(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], value: Lookup) -> Any:
            weight = self.weights.get(node)
            if weight is None:
                return as_it_is(node, args, kwargs, value)
            x = args[0]
            if (grid := self.steps.get(node)) is not None:
                place = self.bins.get(node)
                x = grid(x, None if place is None else place(timesteps).expand(len(x)))
            if isinstance(weight, SoftWeight):
                if id(weight) not in made:
                    made[id(weight)] = how(weight)
                weight = made[id(weight)]
            return F.linear(x, weight.to(x.dtype), args[2] if len(args) > 2 else None)

        return run_segment(self.module, self.segment, values, compute)

    def soft(self) -> list[SoftWeight]:
        """The weights that are learned."""
        return list({id(w): w for w in self.weights.values() if isinstance(w, SoftWeight)}.values())

    def learned_steps(self) -> list[LearnedSteps]:
        """The grids that are learned."""
        grids = (grid for grid in self.steps.values() if isinstance(grid, LearnedSteps))
        return list({id(grid): grid for grid in grids if grid.growth.requires_grad}.values())


def can_be_shared(segment: Segment, inputs: Sequence[Values], targets: Sequence[Values]) -> bool:
    """Whether several processes can share the samples of a segment's minibatches; arguments as of :func:`learn`."""
    return mixable(inputs, segment.inputs) and mixable(targets, _compared(segment, targets))


def learn(
    simulation: Simulation,
    inputs: Sequence[Values],
    targets: Sequence[Values],
    timesteps: Sequence[Tensor],
    settings: Settings,
    advance: Callable[[int], object] = lambda iteration: None,
    team: Team | None = None,
) -> tuple[float, float]:
    """Learn one segment; if the result is not better than the start, go back to the start.

    Args:
        simulation: Its soft weights and steps are optimized in place.
        inputs: Values of the segment's inputs by call, as the quantized model has them.
        targets: Values of its outputs by call, as the float model has them.
        timesteps: Timestep of each sample by call, ``[n]``.
        settings: How the segment is learned.
        advance: Called after each step with its number, from 1.
        team: Processes that call this with the same arguments and take a part of the samples of each step, if the
            segment :func:`can_be_shared`. Gradients are added up, so all learn the same, and what one process learns
            up to rounding.

    Returns:
        Error of the outputs relative to their energy, before and after.

    Raises:
        RankError: If another rank failed or died.
    """
    segment = simulation.segment
    outputs = _compared(segment, targets)
    # A segment does not make the values that it reads, so one mapping holds both.
    chunks = [
        {**given, **{node: wanted[node] for node in outputs}} for given, wanted in zip(inputs, targets, strict=True)
    ]
    nodes = (*segment.inputs, *outputs)
    energy = {node: sum(float(chunk[node].double().square().sum()) for chunk in chunks) or 1.0 for node in outputs}
    samples, mixed = sum(len(rows) for rows in timesteps), mixable(chunks, nodes)

    def loss_of(made: Values, wanted: Values) -> Tensor:
        errors = [(made[node].float() - wanted[node].float()).square().sum() / energy[node] for node in outputs]
        return torch.stack(errors).sum()

    @torch.no_grad()
    def error(how: Callable[[SoftWeight], Tensor]) -> float:
        mine = range(len(chunks)) if team is None else team.share(len(chunks))
        errors = [float(loss_of(simulation.run(chunks[n], timesteps[n], how), chunks[n])) for n in mine]
        of_ranks: list[list[float]] = [errors] if team is None else team.gather(errors)
        return sum(itertools.chain.from_iterable(of_ranks))

    def batch() -> tuple[Values, Tensor, int]:
        """Values and timesteps of the samples of this process, and the number of samples of all processes."""
        if team is None:
            values, rows = minibatch(chunks, nodes, timesteps, mixed, generator, settings.batch)
            return values, rows, len(rows)
        picked = pick(timesteps, generator, settings.batch)
        total = sum(len(index) for _, index in picked)
        mine = part_of(picked, team.share(total))
        return (*taken(chunks, nodes, timesteps, mine), total) if mine else ({}, timesteps[0][:0], total)

    soft, steps = simulation.soft(), simulation.learned_steps()
    before = error(SoftWeight.nearest)
    started = [weight.v.detach().clone() for weight in soft]
    elements = sum(weight.v.numel() for weight in soft)
    groups: list[dict[str, Any]] = [
        {"params": [weight.v for weight in soft], "lr": settings.rounding_rate},
        {"params": [grid.growth for grid in steps], "lr": settings.step_rate},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups or not before > 0:
        return before, before
    learned = [weight for group in groups for weight in group["params"]]
    optimizer = torch.optim.Adam(groups)
    generator = torch.Generator().manual_seed(settings.seed)
    hardening = settings.hardening
    for iteration in range(hardening.iterations):
        values, rows, total = batch()
        losses = []
        if len(rows):
            made = simulation.run(values, rows, SoftWeight.__call__)
            # The unit is the error of rounding to nearest, one unit per weight, as in the regularizer.
            losses.append(loss_of(made, values) * (samples / total) * (elements / before))
        exponent = hardening.exponent(iteration)
        if exponent is not None and soft:
            share = hardening.weight if team is None else hardening.weight / team.size
            losses.append(share * torch.stack([weight.undecided(exponent) for weight in soft]).sum())
        optimizer.zero_grad()
        if losses:
            torch.stack(losses).sum().backward()
        if team is not None:
            _add_up_gradients(learned, team)
        if steps:
            optimizer.param_groups[-1]["lr"] = (
                settings.step_rate * (1 + math.cos(math.pi * iteration / hardening.iterations)) / 2
            )
        optimizer.step()
        advance(iteration + 1)
    after = error(as_codes)
    if not after < before:
        with torch.no_grad():
            for weight, first in zip(soft, started, strict=True):
                weight.v.copy_(first)
            for grid in steps:
                grid.growth.zero_()
        return before, before
    return before, after


def as_codes(weight: SoftWeight) -> Tensor:
    """A soft weight with the values of its final codes."""
    return weight.hard().dequantize(torch.float32)


def _compared(segment: Segment, targets: Sequence[Values]) -> list[fx.Node]:
    """The outputs of a segment that are compared with those of the float model."""
    return [node for node in segment.outputs if _is_float(targets[0][node])]


def _add_up_gradients(learned: Sequence[Tensor], team: Team) -> None:
    for weight in learned:
        if weight.grad is None:  # No sample of this step is of this process.
            weight.grad = torch.zeros_like(weight)
    team.add_up_often([weight.grad for weight in learned if weight.grad is not None])


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
