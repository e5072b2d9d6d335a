"""Divide the denoising timesteps into groups that share their time-dependent parameters."""

from __future__ import annotations

import enum
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import fx

from fxquant.channels.solution import Request
from fxquant.channels.walk import solve
from fxquant.errors import ConfigurationError, QualityWarning
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.stages import Stage
from fxquant.ir.time_tables import boundaries_between, timestep_input, unfit
from fxquant.passes._seeds import is_transformed, parse_cost, parse_roles, seeds_to_transform, targets_of
from fxquant.pipeline.pipeline import Pass, Tier, register_pass
from fxquant.planning.context import PassContext
from fxquant.planning.decisions import LayerPlan, TimestepGroups
from fxquant.planning.grouping import best_segments, check_groups, cut, merge_neighbours
from fxquant.planning.layer_inputs import layer_input

_FEWEST_FOR_TWO = 11  # Timesteps of which a tenth, rounded up, is more than one.


class Grouping(enum.Enum):
    """How the groups are found. In both methods a group consists of neighbouring timesteps."""

    GREEDY = "greedy"
    """As in HTG: merge the two neighbouring groups with the closest mean shifts until ``groups`` are left."""
    OPTIMAL = "optimal"
    """The exact minimum of the squared distances to the groups' means, by dynamic programming."""


@register_pass
@dataclass(frozen=True)
class GroupTimesteps(Pass):
    """Write groups of neighbouring timesteps into the plan for every balanced linear. The graph does not change.

    Hierarchical timestep grouping (arXiv 2503.06930): z_t[j] = (max X_j + min X_j) / 2 is the middle of input channel j
    at timestep t. The neighbouring timesteps whose middles are closest in squared L2 are merged, then neighbouring
    groups by their mean middles, until ``groups`` remain. Layers whose channels are shifted together are grouped
    together. Boundaries lie halfway between the calibrated timesteps, so timesteps of another schedule fall into the
    closest group.

    Attributes:
        groups: Number of groups; 0 for a tenth of the calibrated timesteps, rounded up. If that is one group, the plan
            holds the reason and a QualityWarning says so.
        method: ``greedy``, as in the paper, or ``optimal``.
        roles: Roles of the layers, joined by ``+``.
        dearest: The highest cost that :class:`~fxquant.passes.shift_channels.ShiftChannels` will be allowed. It
            decides which channels are shifted together.
    """

    name: ClassVar[str] = "group-timesteps"
    tier: ClassVar[Tier] = Tier.EXACT
    requires: ClassVar[Stage] = Stage.TRANSFORMED
    establishes: ClassVar[Stage] = Stage.CAPTURED
    keeps_inputs: ClassVar[bool] = True

    groups: int = 0
    method: Grouping = Grouping.GREEDY
    roles: str = "block"
    dearest: str = "vector"

    def __post_init__(self) -> None:
        parse_roles(self.name, self.roles)
        parse_cost(self.dearest)
        if self.groups < 0:
            raise ConfigurationError(f"{self.name}: {self.groups} groups of timesteps are not possible")

    def wants_statistics(self, layer: LayerPlan) -> bool:
        return is_transformed(layer, self.roles.split("+"))

    def decides(self, name: str, layer: LayerPlan) -> bool:
        """Whether the pass decides the groups of a layer."""
        return layer.weight_bits is not None and is_transformed(layer, self.roles.split("+"))

    def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
        roles = self.roles.split("+")
        seeds = seeds_to_transform(graph, context, roles)
        if not seeds:
            return
        timestep = timestep_input(graph, context.plan.timestep)
        solution = solve(graph, seeds, parse_cost(self.dearest), Request.SHIFT, timestep)
        for names in solution.groups():
            group = [solution.grants[name].seed for name in names]
            layers = [targets_of(seed, context, roles) for seed in group]
            if all(context.plan.layer(name).timesteps is None for targets in layers for name in targets):
                reason = next((why for seed in group if (why := unfit(timestep, seed.value.meta["val"]))), None)
                if timestep.meta["val"].dim() > 1 and reason is not None:
                    self._warn(context, f"{reason}, so all timesteps share one shift and one range")
                found = self._decide(context, [targets[0] for targets in layers], reason)
                for name in (name for targets in layers for name in targets):
                    context.plan.layer(name).timesteps = found

    def _decide(self, context: PassContext, names: Sequence[str], reason: str | None) -> TimestepGroups:
        seen = [layer_input(context, name) for name in names]
        steps = seen[0].timesteps
        if reason is None and any(other.timesteps != steps for other in seen):
            reason = "calibration saw the layers that are shifted together at different timesteps"
        if reason is not None:
            return TimestepGroups([], reason=reason)
        middles = np.concatenate([((one.minimum + one.maximum) / 2).numpy() for one in seen], axis=1)
        count = check_groups(self.groups, len(steps))
        merges = merge_neighbours(middles)
        reason = self._why_one(count, len(steps), context)
        starts = cut(merges, len(steps), count) if self.method is Grouping.GREEDY else best_segments(middles, count)
        groups = [steps[start:stop] for start, stop in zip(starts, [*starts[1:], len(steps)], strict=True)]
        tree = [[steps[merge.left], steps[merge.right], merge.distance] for merge in merges]
        return TimestepGroups(boundaries_between(groups), tree, reason)

    def _why_one(self, count: int, timesteps: int, context: PassContext) -> str | None:
        """Why all timesteps are one group although nobody asked for one group; it is said once, as a warning."""
        if count > 1 or self.groups == 1:
            return None
        reason = (
            f"the {timesteps} calibrated timesteps make one group, because groups=0 stands for a tenth of them, "
            f"rounded up; {_FEWEST_FOR_TWO} timesteps are the fewest for two groups"
        )
        self._warn(
            context,
            f"{reason}. Calibrate with {_FEWEST_FOR_TWO} or more steps, or choose the number: {self.name}{{groups=2}}",
        )
        return reason

    def _warn(self, context: PassContext, text: str) -> None:
        """Warn that there is one group; once, as many layers have the same reason."""
        if "warned" not in context.memo:
            context.memo["warned"] = True
            warnings.warn(f"{self.name}: {text}", QualityWarning, stacklevel=3)
