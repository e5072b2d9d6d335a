"""Calibration statistics of a layer's input after the shift and the balancing that the plan holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.planning.context import PassContext
from fxquant.planning.plan import Plan


@dataclass(frozen=True, eq=False)
class LayerInput:
    """A layer's input at T timesteps, ascending.

    Attributes:
        timesteps: The timesteps.
        minimum: Exact minimum of each channel, float64 ``[T, C]``.
        maximum: Exact maximum of each channel, float64 ``[T, C]``.
        rows: Sampled rows at each timestep, T tensors float32 ``[n, C]``.
        bins: Bin of each timestep, int64 ``[T]``; all 0 for a layer without timestep groups.
    """

    timesteps: list[float]
    minimum: Tensor
    maximum: Tensor
    rows: list[Tensor]
    bins: Tensor

    @property
    def absmax(self) -> Tensor:
        """Largest magnitude of each channel, float64 ``[T, C]``."""
        return torch.maximum(self.minimum.abs(), self.maximum.abs())


def layer_input(context: PassContext, name: str, bin_: int | None = None) -> LayerInput:
    """Calibration statistics of a layer's input, shifted and balanced, in either order, as far as the plan has decided.

    Args:
        context: The plan and the statistics.
        name: The layer.
        bin_: Take only the timesteps of this bin and one neighbour on either side, all with the shift of this bin.
            Another schedule can have timesteps up to the boundaries of the bin, and the neighbours are the nearest
            timesteps there that calibration saw.

    Raises:
        CalibrationError: There are no statistics, or calibration never reached the layer.
    """
    plan = context.plan
    seen = context.observed(plan.layer(name).observed or name)
    steps = seen.timesteps
    bins = plan.layer(name).bins(steps)
    samples, low, high = seen.rows_by_timestep, seen.minimum, seen.maximum
    if bin_ is not None:
        inside = torch.nonzero(bins == bin_).flatten().tolist() or [0, len(steps) - 1]
        part = slice(max(inside[0] - 1, 0), inside[-1] + 2)
        steps, samples, low, high = steps[part], samples[part], low[part], high[part]
        bins = torch.full_like(bins[part], bin_)
    table, factor = _shift(plan, name), plan.vectors.get(name)
    shift = torch.zeros(1, 1, dtype=torch.float64) if table is None else table[bins]
    divisor = torch.ones(1, dtype=torch.float64) if factor is None else factor.double()
    low, high = ((bound.double() - shift) / divisor for bound in (low, high))
    moved = zip(samples, shift.expand(len(steps), -1), strict=True)
    rows = [((sample.double() - z) / divisor).float() for sample, z in moved]
    return LayerInput(steps.tolist(), low, high, rows, bins)


def moments(context: PassContext, name: str) -> Tensor | None:
    """Second moments E[x x^T] of a layer's input, shifted and balanced: float64 ``[C, C]``; None if not recorded."""
    plan = context.plan
    seen = context.observed(plan.layer(name).observed or name)
    if seen.moments is None:
        return None
    shift = _shift(plan, name)
    shifts = None
    if shift is not None:
        steps = torch.tensor(list(seen.moments.sums), dtype=torch.float64)
        shifts = dict(zip(steps.tolist(), shift[plan.layer(name).bins(steps)], strict=True))
    return seen.moments.of(plan.vectors.get(name), shifts)


def _shift(plan: Plan, name: str) -> Tensor | None:
    """What is subtracted from the input before it is divided by the balance factors, per bin: float64 ``[bins, C]``.

    For a shift after balancing, x / b - z equals (x - b z) / b.
    """
    table, decided = plan.vectors.get(f"{name}.shift"), plan.layer(name).shift
    if table is None:
        return None
    factor = plan.vectors.get(name) if decided is not None and decided.balanced else None
    return table.double() if factor is None else table.double() * factor.double()
