"""What observers recorded, as rows and as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fxquant.errors import UnknownNameError
from fxquant.statistics.channels import ChannelStatistics
from fxquant.text import fitted, json_values, nearest, size


@dataclass(frozen=True)
class ObservedRow:
    """One observed value, or one timestep of it.

    Attributes:
        key: Key of the value: the first layer that reads it, or an attention with ``:q``, ``:k`` or ``:v``.
        timestep: The timestep, or None for all.
        timesteps: Number of timesteps.
        channels: Number of channels.
        count: Rows (tokens) seen.
        low: Smallest value.
        high: Largest value.
        absmax_median: Median over channels of the largest magnitude of each channel.
        absmax_max: The largest magnitude of the most extreme channel.
        widest: Number of the most extreme channel.
        moves: The largest divided by the smallest maximum magnitude over the timesteps; None for one timestep.
        moments: Whether second moments were recorded.
    """

    key: str
    timestep: float | None
    timesteps: int
    channels: int
    count: int
    low: float
    high: float
    absmax_median: float
    absmax_max: float
    widest: int
    moves: float | None
    moments: bool

    def to_json(self) -> dict[str, Any]:
        """The row as JSON values."""
        values = json_values(asdict(self))
        assert isinstance(values, dict)
        return values


def rows_of(statistics: Mapping[str, ChannelStatistics], layer: str | None = None) -> list[ObservedRow]:
    """One row per observed value; for one value a row for all timesteps, and then one row per timestep.

    Raises:
        UnknownNameError: If nothing was recorded under the key ``layer``.
    """
    if layer is None:
        return [_row(found, None) for found in statistics.values()]
    if layer not in statistics:
        raise UnknownNameError("observed value", layer, nearest(layer, statistics)[:10])
    found = statistics[layer]
    return [_row(found, None), *(_row(found, number) for number in range(len(found)))]


def text_of(rows: list[ObservedRow], summary: str) -> str:
    """The rows as text of at most 140 columns."""
    one = any(row.timestep is not None for row in rows)
    header = ["timestep" if one else "value", "timesteps", "channels", "rows", "min", "max", "median|x|", "max|x|",
              "channel", "moves", "moments"]  # fmt: skip
    cells = []
    for row in rows:
        name = ("all" if row.timestep is None else f"{row.timestep:g}") if one else row.key
        numbers = [f"{value:.4g}" for value in (row.low, row.high, row.absmax_median, row.absmax_max)]
        moves = "" if row.moves is None else f"{row.moves:.2f}x"
        counts = ["" if row.timestep is not None else str(row.timesteps), str(row.channels), str(row.count)]
        cells.append([name, *counts, *numbers, str(row.widest), moves, "yes" if row.moments else ""])
    return f"{summary}\n\n{fitted(header, cells, {0: 60}, range(1, 10))}"


def summary_of(statistics: Mapping[str, ChannelStatistics], timesteps: int, calls: int, nbytes: int) -> str:
    """The totals on one line."""
    return f"{len(statistics)} observed values, {timesteps} timesteps, {calls} calls kept, {size(nbytes)}"


def _row(found: ChannelStatistics, number: int | None) -> ObservedRow:
    chosen = slice(None) if number is None else slice(number, number + 1)
    low, high, absmax = found.minimum[chosen], found.maximum[chosen], found.absmax[chosen]
    by_channel, by_timestep = absmax.amax(0), absmax.amax(1)
    moves = None
    if len(absmax) > 1 and float(by_timestep.min()) > 0:
        moves = float(by_timestep.max() / by_timestep.min())
    return ObservedRow(
        key=found.key,
        timestep=None if number is None else float(found.timesteps[number]),
        timesteps=len(absmax),
        channels=found.channels,
        count=int(found.count[chosen].sum()),
        low=float(low.min()),
        high=float(high.max()),
        absmax_median=float(torch.median(by_channel)),
        absmax_max=float(by_channel.max()),
        widest=int(by_channel.argmax()),
        moves=moves,
        moments=found.moments is not None,
    )
