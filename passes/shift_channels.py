"""Shift the channels of activations so that their ranges are centered on 0, per group of timesteps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, fx

from fxquant.channels.rules.shifts import shift_output
from fxquant.channels.solution import Grant, Request, Seed, Solution
from fxquant.channels.walk import solve
from fxquant.errors import ConfigurationError
from fxquant.ir.arguments import args
from fxquant.ir.histories import digest
from fxquant.ir.layer_changes import note_shift
from fxquant.ir.layers import parameter_of
from fxquant.ir.meta import PROVENANCE
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.stages import Stage
from fxquant.ir.time_tables import TimeTable, rows_at, timestep_input
from fxquant.passes._seeds import (
    follow,
    is_transformed,
    parse_cost,
    parse_roles,
    parts_of,
    seeds_to_transform,
    seeds_undone_before,
    targets_of,
)
from fxquant.pipeline.pipeline import Pass, Tier, register_pass
from fxquant.planning.context import PassContext
from fxquant.planning.decisions import LayerPlan, Shift
from fxquant.planning.layer_inputs import layer_input


@register_pass
@dataclass(frozen=True)
class ShiftChannels(Pass):
    """Subtract z from each activation channel and add ``W z`` to the bias, so that channels are symmetric about 0.

    Before::

        y = linear(x, W, bias)

    After, with tables over the bins of timesteps that the plan has for the layer, one row per sample::

        y = linear(channel_affine(x, 1, -z[bin]), W) + (bias + W z)[bin]

    HTG (arXiv 2503.06930): z_t[j] is halfway between the smallest and the largest value of channel j at timestep t, and
    z of a bin is the mean over its timesteps. With one bin, the shift and the bias are constants (RepQ-ViT, arXiv
    2212.08254). A channel is shifted only if ops upstream can absorb its shift at a cost of at most ``dearest``.

    Attributes:
        dearest: The highest run-time cost allowed: ``in-place`` (only parameters that the model has change), ``free``,
            ``vector`` or ``tokens``.
        roles: Roles of the layers to shift, joined by ``+``.
    """

    name: ClassVar[str] = "shift-channels"
    tier: ClassVar[Tier] = Tier.ALGEBRAIC
    requires: ClassVar[Stage] = Stage.TRANSFORMED
    establishes: ClassVar[Stage] = Stage.TRANSFORMED
    keeps_inputs: ClassVar[bool] = True

    dearest: str = "vector"
    roles: str = "block"

    def __post_init__(self) -> None:
        parse_roles(self.name, self.roles)
        parse_cost(self.dearest)

    def wants_statistics(self, layer: LayerPlan) -> bool:
        return is_transformed(layer, self.roles.split("+"))

    def decides(self, name: str, layer: LayerPlan) -> bool:
        """Whether the pass decides the shifts of a layer's input."""
        return layer.weight_bits is not None and is_transformed(layer, self.roles.split("+"))

    def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
        roles = self.roles.split("+")
        dearest = parse_cost(self.dearest)
        seeds = seeds_to_transform(graph, context, roles, dearest, "bias")
        others = seeds_undone_before(graph, context, seeds, ".shift")
        if not seeds and not others:
            return
        timestep = timestep_input(graph, context.plan.timestep)
        layers = {seed.name: targets_of(seed, context, roles) for seed in seeds}
        moving = any(context.plan.layer(name).boundaries for names in layers.values() for name in names)
        request = Request.SHIFT if moving else Request.STATIC_SHIFT
        solution = solve(graph, seeds, dearest, request, timestep)
        for group in solution.groups():
            if all(context.plan.layer(name).shift is None for seed in group for name in layers[seed]):
                self._decide(solution, {seed: layers[seed] for seed in group}, context)
            else:
                follow("shift", [layers[seed] for seed in group], context.plan)
        for seed in [*seeds, *others]:
            for part in parts_of(seed, context, roles, ".shift"):
                if not self._is_done(part.readers):
                    _shift(part.seed(seed), TimeTable(timestep, part.boundaries, part.vector), rewriter)

    def _is_done(self, readers: Sequence[fx.Node]) -> bool:
        """Whether this pass has already added shifts to the outputs of these linears."""
        changed = [user for reader in readers for user in reader.users]
        changed += [parameter_of(bias) for reader in readers for bias in reader.all_input_nodes[2:]]
        return any(origin.pass_name == self.name for node in changed for origin in node.meta.get(PROVENANCE, ()))

    def _decide(self, solution: Solution, layers: Mapping[str, Sequence[str]], context: PassContext) -> None:
        """Write the shifts of one group of seeds into the plan. Channels of one class share their mean shift."""
        every = [name for targets in layers.values() for name in targets]
        if len({context.plan.layer(name).boundaries for name in every}) > 1:
            raise ConfigurationError(
                f"{self.name}: layers {', '.join(every)} are shifted together but have different groups of timesteps; "
                "give group-timesteps the same dearest= and roles=, or edit the plan"
            )
        middles = {}
        for seed, names in layers.items():
            seen = layer_input(context, names[0])
            middle = (seen.minimum + seen.maximum) / 2
            bins = range(len(context.plan.layer(names[0]).boundaries) + 1)
            middles[seed] = torch.stack([middle[seen.bins == number].mean(dim=0) for number in bins]).nan_to_num()
        classes = np.concatenate([solution.grants[seed].classes for seed in layers])
        numbers, inverse, counts = np.unique(classes, return_inverse=True, return_counts=True)
        together = torch.cat([*middles.values()], dim=1)
        sums = torch.zeros(len(together), len(numbers), dtype=torch.float64)
        sums.index_add_(1, torch.from_numpy(inverse), together)
        mean = sums / torch.from_numpy(counts)
        mean[:, torch.from_numpy(numbers == 0)] = 0.0
        start = 0
        for seed, names in layers.items():
            grant = solution.grants[seed]
            z = mean[:, torch.from_numpy(inverse[start : start + grant.seed.channels])]
            start += grant.seed.channels
            for name in names:
                context.plan.layer(name).shift = _entry(grant, balanced=name in context.plan.vectors)
                if grant.granted.any():
                    context.plan.vectors[f"{name}.shift"] = z.clone()


def _entry(grant: Grant, balanced: bool) -> Shift:
    return Shift(str(grant.cost), list(grant.into), int(grant.granted.sum()), grant.reason, balanced)


def _shift(seed: Seed, z: TimeTable, rewriter: Rewriter) -> None:
    # Not seed.value: if that is the output of a linear that was shifted, its readers read the sum with the rows.
    (value,) = {args(reader).node("input") for reader in seed.readers}
    with rewriter.before(min(seed.readers)):
        # Float64 for every model dtype, like the factors of balancing.
        rows = rows_at(rewriter, z.map(Tensor.neg), value.meta["val"].dim(), f"{seed.name}.shift", [value])
        one = rewriter.constant(f"{seed.name}.one", torch.ones(1, dtype=torch.float64), [value])
        shifted = rewriter.call(
            torch.ops.fxquant.channel_affine.default,
            (value, one, rows),
            sources=[value],
            name=f"{value.name}_shifted",
            layer=True,
        )
    for reader in seed.readers:
        rewriter.redirect(reader, value, shifted)
        note_shift(rewriter.module, reader, z)
        parameter = parameter_of(args(reader).node("weight"))
        weight = rewriter.tensor(parameter).double()
        table = z.map(lambda rows, weight=weight: rows.to(weight.device) @ weight.T)  # type: ignore[misc]
        follows = digest("product", z.origin, rewriter.history(parameter).digest)
        shift_output(reader, rewriter, replace(table, follows=follows))
