"""Give the ranges of linears' inputs bins of timesteps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import fx

from fxquant.errors import ConfigurationError
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.stages import Stage
from fxquant.ir.time_tables import boundaries_between, timestep_input, unfit
from fxquant.pipeline.pipeline import Pass, Tier, register_pass
from fxquant.planning.context import PassContext
from fxquant.planning.decisions import LayerPlan, TimestepGroups
from fxquant.planning.grouping import best_segments
from fxquant.planning.layer_inputs import layer_input
from fxquant.planning.linears import linears_to_quantize

_FLOOR = 1e-3  # Of the largest end: ends below differ too little from 0 to need bins of their own.


@register_pass
@dataclass(frozen=True)
class BinRanges(Pass):
    """Write bins of neighbouring timesteps into the plan for every quantized linear input. The graph does not change.

    Later, ``quantize-linears`` finds one range per bin, with the search that it was told (``minmax``, ``percentile``,
    ``mse``), and the scale and zero point become rows of tables over the bins. So inputs that are small at some
    timesteps and large at others keep their resolution, without shifts.

    Let lo_t and hi_t be the ends of the input's range at timestep t. The bins minimize the squared distances of
    ``(log |lo_t|, log |hi_t|)`` to the means of the bins, exactly, by dynamic programming
    (:func:`fxquant.planning.grouping.best_segments`). Logarithms, because a range that is wide by a factor costs the
    same decibels whatever its size. Linears that read the same value share their bins. Bins that the plan holds, such
    as those of ``group-timesteps``, are kept.

    Attributes:
        bins: The most bins per input. There are never more than calibrated timesteps.
    """

    name: ClassVar[str] = "bin-ranges"
    tier: ClassVar[Tier] = Tier.EXACT
    requires: ClassVar[Stage] = Stage.TRANSFORMED
    establishes: ClassVar[Stage] = Stage.CAPTURED
    keeps_inputs: ClassVar[bool] = True

    bins: int = 10

    def __post_init__(self) -> None:
        if self.bins < 1:
            raise ConfigurationError(f"{self.name}: {self.bins} bins of timesteps are not possible; choose 1 or more")

    def decides(self, name: str, layer: LayerPlan) -> bool:
        """Whether the pass decides the bins of a layer's input."""
        return layer.kind == "linear" and layer.weight_bits is not None and layer.activation_bits is not None

    def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
        linears = [linear for linear in linears_to_quantize(graph, context.plan) if _is_open(linear.plan)]
        if not linears or context.statistics is None:
            return
        timestep = timestep_input(graph, context.plan.timestep)
        for linear in linears:
            key = ("bins", linear.input, linear.plan.observed)
            if key not in context.memo:
                why = unfit(timestep, linear.input.meta["val"])
                context.memo[key] = self._decide(context, linear.name, why)
            linear.plan.timesteps = context.memo[key]

    def _decide(self, context: PassContext, name: str, reason: str | None) -> TimestepGroups:
        if reason is not None:
            return TimestepGroups([], reason=reason)
        seen = layer_input(context, name)
        count = min(self.bins, len(seen.timesteps))
        ends = np.stack([seen.minimum.amin(dim=1).numpy(), seen.maximum.amax(dim=1).numpy()], axis=1)
        floor = _FLOOR * max(float(np.abs(ends).max()), np.finfo(np.float64).tiny)
        starts = best_segments(np.log(np.maximum(np.abs(ends), floor)), count)
        stops = [*starts[1:], len(seen.timesteps)]
        groups = [seen.timesteps[start:stop] for start, stop in zip(starts, stops, strict=True)]
        only = "calibration saw one timestep" if len(seen.timesteps) == 1 < self.bins else None
        return TimestepGroups(boundaries_between(groups), reason=only)


def _is_open(layer: LayerPlan) -> bool:
    return layer.activation is None and layer.timesteps is None
