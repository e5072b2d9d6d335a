"""What calibration saw of a layer's input, as it is after the shift and the balancing that the plan says."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.planning.plan import Plan


@dataclass(frozen=True, eq=False)
class Evidence:
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


def evidence(plan: Plan, name: str, bin_: int | None = None) -> Evidence:
    """What calibration saw of the input of a layer, shifted and balanced as the plan says so far, in that order or not.

    Args:
        plan: The plan.
        name: The layer.
        bin_: Take only the timesteps of this bin and the one next to it on either side, all shifted as this bin is:
            another schedule has timesteps up to the boundaries, of which these are the nearest that were seen.

    Raises:
        CalibrationError: There are no statistics, or calibration never reached the layer.
    """
    seen = plan.evidence(plan.layer(name).observed or name)
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
    return Evidence(steps.tolist(), low, high, rows, bins)


def moments(plan: Plan, name: str) -> Tensor | None:
    """Second moments E[x x^T] of the input of a layer, shifted and balanced: float64 ``[C, C]``; None without any."""
    seen = plan.evidence(plan.layer(name).observed or name)
    if seen.moments is None:
        return None
    shift = _shift(plan, name)
    shifts = None
    if shift is not None:
        steps = torch.tensor(list(seen.moments.sums), dtype=torch.float64)
        shifts = dict(zip(steps.tolist(), shift[plan.layer(name).bins(steps)], strict=True))
    return seen.moments.of(plan.vectors.get(name), shifts)


def _shift(plan: Plan, name: str) -> Tensor | None:
    """What is taken off the input before it is divided by the factors, by bin: float64 ``[bins, C]``.

    A shift after balancing, x / b - z, is (x - b z) / b.
    """
    table, decided = plan.vectors.get(f"{name}.shift"), plan.layer(name).shift
    if table is None:
        return None
    factor = plan.vectors.get(name) if decided is not None and decided.balanced else None
    return table.double() if factor is None else table.double() * factor.double()
