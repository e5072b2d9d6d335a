"""Choice of the range that a grid covers: the whole range of the values, or a clipped range with a lower error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from fxquant.errors import ConfigurationError
from fxquant.numerics.formats.format import Format, Scales
from fxquant.numerics.grids import compute_dtype
from fxquant.numerics.slices import map_slices, slices_of

RangeMethod = Literal["minmax", "percentile", "mse"]
"""How the range of a grid is chosen: the whole range, or the clipped one of lowest error among a few or among many."""

PERCENTILES = (0.999, 0.9999, 0.99999)
"""The two-sided percentiles that PTQ4DiT (arXiv 2405.16005) tries."""

_ACTIVATION_SHRINKS = 39
_COARSE_SHRINKS = tuple(1.0 - 0.1 * step for step in range(9))
_FINE_SHRINKS = (1.0, 0.925, 0.95, 0.975, 1.025, 1.05, 1.075)


def activation_range(samples: Tensor, lo: float, hi: float, format: Format, method: RangeMethod) -> tuple[float, float]:
    """Choose the range of one grid for a whole activation.

    `minmax` keeps `[lo, hi]`. `percentile` takes, among `[lo, hi]` and the two-sided percentiles :data:`PERCENTILES` of
    the samples, the range with the lowest mean squared error on the samples (PTQ4DiT, arXiv 2405.16005). `mse` does so
    among all pairs of `lo` and `hi`, each shrunk by 39 factors from 1 down to 0.05.

    Args:
        samples: Values seen in calibration, any shape and float dtype, finite; they need not include the extremes.
        lo: Lowest value seen.
        hi: Highest value seen.
        format: The number format of the codes, which has neither blocks nor scales of scales.
        method: One of `minmax`, `percentile`, `mse`.

    Returns:
        The lower and the upper end, within `[min(lo, 0), max(hi, 0)]`, ready for
        :meth:`~fxquant.numerics.formats.Format.scales`.

    Raises:
        ConfigurationError: `method` is unknown, or a search is asked for without samples.
    """
    check_method(method)
    lo, hi = min(lo, 0.0), max(hi, 0.0)
    if method == "minmax":
        return lo, hi
    if samples.numel() == 0:
        raise ConfigurationError(f"the range method {method!r} needs samples, but got none; use 'minmax' instead.")
    ordered = samples.detach().flatten().to(compute_dtype(samples.dtype)).sort().values.to(torch.float64)
    # The whole range comes first, so that nothing is clipped if errors are equal.
    if method == "percentile":
        ends = [(lo, hi)]
        for share in PERCENTILES:
            ends.append((max(lo, min(0.0, _at(ordered, 1.0 - share))), min(hi, max(0.0, _at(ordered, share)))))
        lows, highs = torch.tensor(ends, dtype=torch.float64, device=ordered.device).unbind(1)
    else:
        factors = torch.linspace(1.0, 0.05, _ACTIVATION_SHRINKS, dtype=torch.float64, device=ordered.device)
        pairs = torch.cartesian_prod(factors, factors)
        lows, highs = lo * pairs[:, 0], hi * pairs[:, 1]
    best = int(_sorted_errors(ordered, lows, highs, format).argmin().item())
    return float(lows[best].item()), float(highs[best].item())


def weight_range(
    rows: Tensor,
    format: Format,
    method: RangeMethod,
    symmetric: bool = False,
    importance: Tensor | None = None,
    global_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose the range of each row of a weight.

    The methods are those of :func:`activation_range`, row by row, except that `mse` shrinks both ends of a row
    together, first by nine factors from 1 down to 0.2, then by seven more around the best of them. Searches run in
    slices of rows, so their memory does not grow with the weight.

    Args:
        rows: `[rows, n]`, any float dtype; each row (an output channel or one of its groups) has its own grid.
        format: The number format of the codes.
        method: One of `minmax`, `percentile`, `mse`.
        symmetric: Whether the grids will be symmetric, which affects the error of a range.
        importance: Weights of the squared errors in the searches, `[rows, n]` or `[1, n]`; all equal if None.
        global_scale: The scale of the scales, for formats that have one, 0-d.

    Returns:
        The lower and the upper ends, `[rows]` each, of the dtype of `rows` for `minmax`, else float64.

    Raises:
        ConfigurationError: `method` is unknown.
    """
    check_method(method)
    rows = rows.detach()
    if method == "minmax":
        return _extremes(rows)

    def scales(low: Tensor, high: Tensor) -> Scales:
        return format.scales(low, high, symmetric=symmetric, global_scale=global_scale)

    def search(piece: Tensor, share: Tensor | None) -> tuple[Tensor, Tensor]:
        values = piece.to(compute_dtype(piece.dtype))
        if method == "percentile":
            return _lowest_error(values, _percentile_ranges(values), scales, format, share)
        low, high = (end.to(torch.float64) for end in _extremes(values))
        for factors in (_COARSE_SHRINKS, _FINE_SHRINKS):
            candidates = [(low * factor, high * factor) for factor in factors]
            low, high = _lowest_error(values, candidates, scales, format, share)
        return low, high

    pieces = slices_of(rows)
    if importance is None or len(importance) == 1:
        shares = [importance] * len(pieces)
    else:
        shares = list(importance.split([len(piece) for piece in pieces]))
    lows, highs = zip(*map_slices(search, [*zip(pieces, shares, strict=True)]), strict=True)
    return torch.cat(lows), torch.cat(highs)


def check_method(method: str) -> None:
    """Refuse a range method that is not known.

    Raises:
        ConfigurationError: Lists the known methods.
    """
    if method not in get_args(RangeMethod):
        raise ConfigurationError(f"unknown range method {method!r}. Known: {', '.join(get_args(RangeMethod))}.")


def _extremes(rows: Tensor) -> tuple[Tensor, Tensor]:
    # Two passes, but ten times faster on a CPU than torch.aminmax along an axis, which is not vectorized.
    return rows.amin(1), rows.amax(1)


def _at(ordered: Tensor, share: float) -> float:
    """The quantile of sorted values, with linear interpolation; `torch.quantile` is limited to 16 million values."""
    position = share * (ordered.numel() - 1)
    below = math.floor(position)
    above = min(below + 1, ordered.numel() - 1)
    low, high = ordered[below].item(), ordered[above].item()
    return float(low + (position - below) * (high - low))


def _sorted_errors(ordered: Tensor, lows: Tensor, highs: Tensor, format: Format) -> Tensor:
    """Mean squared errors of quantizing `ordered`, float64 `[n]` ascending, to the grids of ranges `[candidates]`.

    The values that share a code are a run of the sorted samples, and their squared error follows from the run's count,
    sum and sum of squares. So a candidate costs as many binary searches as there are codes, not as there are samples.
    """
    grids = format.scales(lows, highs)
    usable = format.values().isfinite().nonzero().flatten().to(torch.uint8)
    codes = usable.to(ordered.device).expand(len(lows), -1)
    zero_point = None if grids.zero_point is None else grids.zero_point[:, None]
    levels = format.decode(codes, Scales(grids.scale[:, None], zero_point), torch.float64).sort(1).values
    starts = torch.searchsorted(ordered, (levels[:, :-1] + levels[:, 1:]) / 2)
    bounds = torch.nn.functional.pad(starts, (1, 0), value=0)
    bounds = torch.nn.functional.pad(bounds, (0, 1), value=ordered.numel())
    running = torch.nn.functional.pad(ordered.cumsum(0), (1, 0))
    sums, counts = running[bounds].diff(), bounds.diff()
    total = ordered.square().sum() + (levels * (levels * counts - 2.0 * sums)).sum(1)
    return total / ordered.numel()


def _percentile_ranges(values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The range of each row of `values` `[rows, n]`, then its two-sided percentiles, as float64 `[rows]` pairs."""
    last = values.shape[1] - 1
    # Only the tails are read, and topk is many times faster than sorting.
    tail = min(math.floor((1.0 - min(PERCENTILES)) * last) + 2, last + 1)
    ascending = values.topk(tail, dim=1, largest=False).values.to(torch.float64)
    descending = values.topk(tail, dim=1).values.to(torch.float64)
    yield ascending[:, 0], descending[:, 0]
    for share in PERCENTILES:
        cut = (1.0 - share) * last
        below = math.floor(cut)
        above = min(below + 1, last)
        yield (
            torch.lerp(ascending[:, below], ascending[:, above], cut - below),
            torch.lerp(descending[:, below], descending[:, above], cut - below),
        )


def _lowest_error(
    values: Tensor,
    candidates: Iterable[tuple[Tensor, Tensor]],
    scales: Callable[[Tensor, Tensor], Scales],
    format: Format,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """For each row of `values` `[rows, n]`, the candidate with the lowest squared error; the first of equal ones."""
    share = None if importance is None else importance.to(values.dtype)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for low, high in candidates:
        grids = scales(low, high)
        zero_point = None if grids.zero_point is None else grids.zero_point[:, None]
        # In place, which is twice as fast as allocating new tensors.
        rounded = format.round(values, Scales(grids.scale[:, None], zero_point, grids.global_scale))
        squares = rounded.sub_(values).square_()
        error = squares.sum(1) if share is None else squares.mul_(share).sum(1)
        if best is None:
            best = error, low, high
        else:
            better = error < best[0]
            best = (
                torch.where(better, error, best[0]),
                torch.where(better, low, best[1]),
                torch.where(better, high, best[2]),
            )
    assert best is not None
    return best[1], best[2]
