"""Calibration statistics of a layer's input after the shift and the balancing that the plan holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.planning.context import PassContext
from fxquant.planning.input_transforms import Rows, checked, in_order, linear, transformed_moments
from fxquant.planning.plan import Plan
from fxquant.planning.weighted_moments import weighted_moments
from fxquant.statistics.moments import SecondMoments


@dataclass(frozen=True, eq=False)
class LayerInput:
    """A layer's input at T timesteps, ascending.

    Attributes:
        timesteps: The timesteps.
        minimum: Exact minimum of each channel, float64 ``[T, C]``.
        maximum: Exact maximum of each channel, float64 ``[T, C]``.
        rows: Sampled rows at each timestep, T tensors float32 ``[n, C]``.
        bins: Bin of each timestep, int64 ``[T]``; all 0 for a layer without timestep groups.
        exact: Whether minimum and maximum are exact. If a pass transformed the input, they are those of the sampled
            rows, and rarer values may lie outside.
    """

    timesteps: list[float]
    minimum: Tensor
    maximum: Tensor
    rows: list[Tensor]
    bins: Tensor
    exact: bool = True

    @property
    def absmax(self) -> Tensor:
        """Largest magnitude of each channel, float64 ``[T, C]``."""
        return torch.maximum(self.minimum.abs(), self.maximum.abs())


def layer_input(context: PassContext, name: str, bin_: int | None = None) -> LayerInput:
    """Calibration statistics of a layer's input as the layer reads it now.

    It is shifted and balanced, in either order, as far as the plan has decided, and transformed as passes declared
    (:meth:`PassContext.transform_input`).

    Args:
        context: The plan and the statistics.
        name: The layer.
        bin_: Take only the timesteps of this bin and one neighbour on either side, all with the shift of this bin.
            Another schedule can have timesteps up to the boundaries of the bin, and the neighbours are the nearest
            timesteps there that calibration saw.

    Raises:
        CalibrationError: There are no statistics, or calibration never reached the layer.
        PassError: A pass changed the input and did not declare how.
    """
    plan = context.plan
    seen = context.observed(plan.layer(name).observed or name)
    context.refuse_changed(name)
    steps = seen.timesteps
    bins = plan.layer(name).bins(steps)
    samples, low, high = seen.rows_by_timestep, seen.minimum, seen.maximum
    if bin_ is not None:
        inside = torch.nonzero(bins == bin_).flatten().tolist() or [0, len(steps) - 1]
        part = slice(max(inside[0] - 1, 0), inside[-1] + 2)
        steps, samples, low, high = steps[part], samples[part], low[part], high[part]
        bins = torch.full_like(bins[part], bin_)
    if name in context.transforms:
        rows = [_transformed(context, name, sample, int(number)) for sample, number in zip(samples, bins, strict=True)]
        low, high = torch.stack([row.amin(0) for row in rows]), torch.stack([row.amax(0) for row in rows])
        return LayerInput(steps.tolist(), low, high, [row.float() for row in rows], bins, exact=False)
    table, factor = _shift(plan, name), plan.vectors.get(name)
    shift = torch.zeros(1, 1, dtype=torch.float64) if table is None else table[bins]
    divisor = torch.ones(1, dtype=torch.float64) if factor is None else factor.double()
    low, high = ((bound.double() - shift) / divisor for bound in (low, high))
    moved = zip(samples, shift.expand(len(steps), -1), strict=True)
    rows = [((sample.double() - z) / divisor).float() for sample, z in moved]
    return LayerInput(steps.tolist(), low, high, rows, bins)


def moments(context: PassContext, name: str) -> Tensor | None:
    """Second moments E[x x^T] of a layer's input, shifted and balanced: float64 ``[C, C]``; None if not recorded.

    If a pass transformed the input by a linear function, they follow from what was recorded; for other functions, and
    with shifts, they are those of the sampled rows. Timesteps count as much as :attr:`PassContext.timestep_weights`
    says.

    Raises:
        PassError: A pass changed the input and did not declare how.
    """
    found, weights = _unweighted(context, name), context.timestep_weights.get(name)
    if found is None or weights is None:
        return found
    seen = layer_input(context, name)
    return weighted_moments(found, seen.rows, seen.timesteps, weights)


def moment_rows(context: PassContext, name: str, channels_per_row: int) -> Tensor | None:
    """Few rows R of a layer's input, float64 ``[n, C]``, for which ``R.T @ R`` are the :func:`moments`.

    Args:
        context: The plan and the statistics.
        name: The layer.
        channels_per_row: Rows are few if there are this many times as many channels. No others are copied.

    Returns:
        None if calibration saw more rows, or if the moments do not follow from the rows: with weights of timesteps,
        after transforms that are not linear, and after transforms besides shifts.

    Raises:
        PassError: A pass changed the input and did not declare how.
    """
    recorded = _recorded(context, name)
    if recorded is None or name in context.timestep_weights:
        return None
    if not 0 < channels_per_row * recorded.rows_held <= recorded.channels:
        return None
    if name not in context.transforms:
        return recorded.rows(context.plan.vectors.get(name), _shifts(context.plan, name, recorded))
    shifted = f"{name}.shift" in context.plan.vectors
    chain = None if shifted else linear(list(_changes(context, name, 0)), recorded.channels)
    rows = None if chain is None else recorded.rows()
    return None if chain is None or rows is None else chain(rows.cpu())


def _recorded(context: PassContext, name: str) -> SecondMoments | None:
    key = context.plan.layer(name).observed or name
    context.observed(key)
    context.refuse_changed(name)
    return None if context.statistics is None else context.statistics.moments_of(key)


def _shifts(plan: Plan, name: str, recorded: SecondMoments) -> dict[float, Tensor] | None:
    """What is subtracted from the input at each timestep that was recorded; None if nothing is."""
    shift = _shift(plan, name)
    if shift is None:
        return None
    steps = torch.tensor(list(recorded.sums), dtype=torch.float64)
    return dict(zip(steps.tolist(), shift[plan.layer(name).bins(steps)], strict=True))


def _unweighted(context: PassContext, name: str) -> Tensor | None:
    plan, recorded = context.plan, _recorded(context, name)
    if recorded is None:
        return None
    if name in context.transforms:
        made = list(_changes(context, name, 0))
        found = transformed_moments(recorded, made, shifts=f"{name}.shift" in plan.vectors)
        if found is None:
            rows = torch.cat([row.double() for row in layer_input(context, name).rows])
            found = rows.T @ rows / len(rows)
        return found
    return recorded.of(plan.vectors.get(name), _shifts(plan, name, recorded))


def _changes(context: PassContext, name: str, bin_: int) -> Iterator[Rows]:
    """Every change of a layer's input in one bin of timesteps, in the order in which passes made them."""
    plan = context.plan
    factor, table, decided = plan.vectors.get(name), plan.vectors.get(f"{name}.shift"), plan.layer(name).shift
    return in_order(
        context.transforms[name],
        decided is not None and decided.balanced,
        None if factor is None else lambda rows: rows / factor.double(),
        None if table is None else lambda rows: rows - table[bin_].double(),
    )


def _transformed(context: PassContext, name: str, sample: Tensor, bin_: int) -> Tensor:
    rows = sample.double()
    for function in _changes(context, name, bin_):
        rows = checked(function, rows, name)
    return rows


def _shift(plan: Plan, name: str) -> Tensor | None:
    """What is subtracted from the input before it is divided by the balance factors, per bin: float64 ``[bins, C]``.

    For a shift after balancing, x / b - z equals (x - b z) / b.
    """
    table, decided = plan.vectors.get(f"{name}.shift"), plan.layer(name).shift
    if table is None:
        return None
    factor = plan.vectors.get(name) if decided is not None and decided.balanced else None
    return table.double() if factor is None else table.double() * factor.double()
