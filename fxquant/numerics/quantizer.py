"""What quantization means, as pure tensor arithmetic: grids, range searches, weights, errors. No graph and no model.

The integer grid: a code q is an unsigned integer in `0..2**bits - 1` and stands for `scale * (q - zero_point)`. The
zero point is itself a code, so zero is always exact. *Asymmetric* grids place it anywhere; *symmetric* ones fix it at
`2**(bits - 1)`.

Everything that weights go through runs on fake and meta tensors too and never branches on their values, because passes
are replayed on models without weights. :func:`require_finite` is the one look at values, and it skips such tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from fxquant.errors import ConfigurationError, NonFiniteError
from fxquant.numerics.packing import check_bits, pack, unpack

RangeMethod = Literal["minmax", "percentile", "mse"]
"""How the range of a grid is chosen: all of it, or the clipping with the lowest error among a few or among many."""

PERCENTILES = (0.999, 0.9999, 0.99999)
"""The two-sided percentiles that PTQ4DiT (arXiv 2405.16005) tries."""

T = TypeVar("T")

_ACTIVATION_SHRINKS = 39
_COARSE_SHRINKS = tuple(1.0 - 0.1 * step for step in range(9))
_FINE_SHRINKS = (1.0, 0.925, 0.95, 0.975, 1.025, 1.05, 1.075)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of `dtype` are quantized: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def affine_parameters(
    lo: Tensor | float, hi: Tensor | float, bits: int, symmetric: bool = False
) -> tuple[Tensor, Tensor]:
    """The grid that covers a range.

    The range is widened to include 0. The zero point is computed with the scale as rounded to float32, so that both
    belong together. A range of exactly 0 gets scale 1, one too narrow for a normal float32 scale the smallest of them.

    Args:
        lo: Lowest values, any float dtype and shape.
        hi: Highest values, of the same shape.
        bits: Bits a code, 2 to 8.
        symmetric: Fix the zero point at `2**(bits - 1)`.

    Returns:
        Scale, float32 and positive, and zero point, uint8, both of the shape of `lo`.

    Raises:
        ConfigurationError: `bits` is not in 2..8.
    """
    check_bits(bits)
    low = torch.as_tensor(lo, dtype=torch.float64).clamp(max=0.0)
    high = torch.as_tensor(hi, dtype=torch.float64).clamp(min=0.0)
    top = 2**bits - 1
    if symmetric:
        middle = 2 ** (bits - 1)
        step = torch.maximum(high / (top - middle), -low / middle)
    else:
        step = (high - low) / top
    limits = torch.finfo(torch.float32)
    scale = torch.where(step == 0.0, 1.0, step.clamp(limits.tiny, limits.max)).to(torch.float32)
    if symmetric:
        return scale, torch.full_like(scale, 2 ** (bits - 1), dtype=torch.uint8)
    return scale, (-low / scale.to(torch.float64)).round().clamp(0, top).to(torch.uint8)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """`clamp(round(x / scale) + zero_point, qmin, qmax)`, halves rounded to even.

    Args:
        x: Values, any float dtype.
        scale: Positive, broadcasts against `x`.
        zero_point: Codes, broadcasts against `x`.
        qmin: Lowest code.
        qmax: Highest code.

    Returns:
        The codes, of the shape of `x`, still in a float dtype: float64 if `x` is, else float32.
    """
    dtype = compute_dtype(x.dtype)
    # In place: the quotient is new, and weights are large.
    return (x.to(dtype) / scale.to(dtype)).round_().add_(zero_point.to(dtype)).clamp_(qmin, qmax)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Quantize to unsigned codes of `bits` bits and back. `scale` and `zero_point` broadcast against `x`.

    Returns:
        `scale * (q - zero_point)`, of the shape and dtype of `x`; computed in float32, in float64 if `x` is float64.

    Raises:
        ConfigurationError: `bits` is not in 2..8.
    """
    check_bits(bits)
    codes = quantize(x, scale, zero_point, 0, 2**bits - 1)
    return ((codes - zero_point.to(codes.dtype)) * scale.to(codes.dtype)).to(x.dtype)


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """Signal to quantization noise ratio in dB, `10 log10(sum reference^2 / sum (reference - approximation)^2)`.

    Accumulated in float64. Infinite when the two are equal, minus infinity when the reference is 0 and they are not.

    Raises:
        ConfigurationError: The shapes differ.
    """
    if reference.shape != approximation.shape:
        raise ConfigurationError(
            f"the reference has shape {tuple(reference.shape)}, the approximation {tuple(approximation.shape)}."
        )
    reference, approximation = reference.detach().flatten(), approximation.detach().flatten()
    return _decibels(_map(_energies, list(zip(_slices(reference), _slices(approximation), strict=True))))


def _decibels(energies: Sequence[tuple[float, float]]) -> float:
    return snr_db(*(sum(side) for side in zip(*energies, strict=True)))


def snr_db(signal: float, noise: float) -> float:
    """Decibels of one energy over another; infinite without noise, minus infinity without a signal."""
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal > 0.0 else (math.nan if math.isnan(noise) else -math.inf)


def _energies(reference: Tensor, approximation: Tensor) -> tuple[float, float]:
    """Energy of a vector and of its error, in float64."""
    exact = reference.to(torch.float64)
    error = approximation.to(torch.float64) - exact
    return exact.dot(exact).item(), error.dot(error).item()


def require_finite(tensor: Tensor, what: str) -> None:
    """Refuse NaN and infinity. Fake and meta tensors, which have no values, pass, and so do integers.

    Args:
        tensor: Any shape and dtype.
        what: What the tensor is, as the message should name it, such as ``"the weight of blocks.3.attn1.to_q"``.

    Raises:
        NonFiniteError: An element is NaN or infinite; the message counts both.
    """
    if is_fake(tensor) or tensor.is_meta or not tensor.is_floating_point() or tensor.numel() == 0:
        return
    # The extremes carry any NaN or infinity, and unlike isfinite() need no mask as large as the tensor.
    low, high = torch.aminmax(tensor.detach())
    if math.isfinite(low.item()) and math.isfinite(high.item()):
        return
    nans = int(tensor.isnan().sum().item())
    infinities = int(tensor.isinf().sum().item())
    raise NonFiniteError(
        f"{what} holds {nans} NaN and {infinities} infinite values of {tensor.numel()}, which have no code."
    )


def activation_range(samples: Tensor, lo: float, hi: float, bits: int, method: RangeMethod) -> tuple[float, float]:
    """Choose the range of one grid for a whole activation.

    `minmax` keeps `[lo, hi]`. `percentile` takes, among `[lo, hi]` and the two-sided percentiles :data:`PERCENTILES` of
    the samples, the range with the lowest mean squared error on the samples (PTQ4DiT, arXiv 2405.16005). `mse` searches
    `lo` and `hi` each shrunk by 39 factors from 1 down to 0.05, in all pairs.

    Args:
        samples: Values seen in calibration, any shape and float dtype, finite; they need not hold the extremes.
        lo: Lowest value seen.
        hi: Highest value seen.
        bits: Bits a code, 2 to 8.
        method: One of `minmax`, `percentile`, `mse`.

    Returns:
        The lower and the upper end, within `[min(lo, 0), max(hi, 0)]`, ready for :func:`affine_parameters`.

    Raises:
        ConfigurationError: `bits` is not in 2..8, `method` is unknown, or a search is asked for without samples.
    """
    check_bits(bits)
    _check_method(method)
    lo, hi = min(lo, 0.0), max(hi, 0.0)
    if method == "minmax":
        return lo, hi
    if samples.numel() == 0:
        raise ConfigurationError(f"the range method {method!r} searches on samples, and there are none.")
    ordered = samples.detach().flatten().to(compute_dtype(samples.dtype)).sort().values.to(torch.float64)
    # The whole range comes first: where errors tie, nothing is clipped.
    if method == "percentile":
        ends = [(lo, hi)]
        for share in PERCENTILES:
            ends.append((max(lo, min(0.0, _at(ordered, 1.0 - share))), min(hi, max(0.0, _at(ordered, share)))))
        lows, highs = torch.tensor(ends, dtype=torch.float64, device=ordered.device).unbind(1)
    else:
        factors = torch.linspace(1.0, 0.05, _ACTIVATION_SHRINKS, dtype=torch.float64, device=ordered.device)
        pairs = torch.cartesian_prod(factors, factors)
        lows, highs = lo * pairs[:, 0], hi * pairs[:, 1]
    best = int(_sorted_errors(ordered, lows, highs, bits).argmin().item())
    return float(lows[best].item()), float(highs[best].item())


def weight_range(
    rows: Tensor, bits: int, method: RangeMethod, symmetric: bool = False, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose the range of each row of a weight.

    The methods are those of :func:`activation_range`, row by row, except that `mse` shrinks both ends of a row
    together, first by nine factors from 1 down to 0.2, then by seven more around the best of them. Searches run in
    slices of rows, so their memory does not grow with the weight.

    Args:
        rows: `[rows, n]`, any float dtype, each row (an output channel or one of its groups) on a grid of its own.
        bits: Bits a code, 2 to 8.
        method: One of `minmax`, `percentile`, `mse`.
        symmetric: The grids will be symmetric, which decides what a range costs.
        importance: Weights of the squared errors in the searches, `[rows, n]` or `[1, n]`; all alike if None.

    Returns:
        The lower and the upper ends, `[rows]` each, of the dtype of `rows` for `minmax`, else float64.

    Raises:
        ConfigurationError: `bits` is not in 2..8, or `method` is unknown.
    """
    check_bits(bits)
    _check_method(method)
    rows = rows.detach()
    if method == "minmax":
        return _extremes(rows)

    def search(piece: Tensor, share: Tensor | None) -> tuple[Tensor, Tensor]:
        values = piece.to(compute_dtype(piece.dtype))
        if method == "percentile":
            return _lowest_error(values, _percentile_ranges(values), bits, symmetric, share)
        low, high = (end.to(torch.float64) for end in _extremes(values))
        for factors in (_COARSE_SHRINKS, _FINE_SHRINKS):
            candidates = [(low * factor, high * factor) for factor in factors]
            low, high = _lowest_error(values, candidates, bits, symmetric, share)
        return low, high

    pieces = _slices(rows)
    if importance is None or len(importance) == 1:
        shares = [importance] * len(pieces)
    else:
        shares = list(importance.split([len(piece) for piece in pieces]))
    lows, highs = zip(*_map(search, [*zip(pieces, shares, strict=True)]), strict=True)
    return torch.cat(lows), torch.cat(highs)


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight matrix as packed codes and grids.

    Attributes:
        packed: uint8 `[out, packed_size(in_features, bits)]`.
        scale: float32 `[out, groups]`.
        zero_point: uint8 `[out, groups]`.
        bits: Bits a code, 2 to 8.
        group_size: Input channels that share a grid; 0 for all of them.
        in_features: Codes a row.
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int
    group_size: int
    in_features: int

    @classmethod
    def from_codes(
        cls, codes: Tensor, scale: Tensor, zero_point: Tensor, *, bits: int, group_size: int
    ) -> QuantizedWeight:
        """Pack codes uint8 `[out, in]` that were decided elsewhere, for example by an adaptive rounding method.

        Raises:
            ConfigurationError: As :func:`quantize_weight`, or the codes are not uint8.
        """
        group_count(codes.shape[1], group_size)
        return cls(pack(codes, bits), scale, zero_point, bits, group_size, codes.shape[1])

    def codes(self) -> Tensor:
        """The codes, uint8 `[out, in_features]`."""
        return unpack(self.packed, self.bits, self.in_features)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """`scale * (q - zero_point)`, `[out, in_features]` of `dtype`, computed in float32, in float64 for float64."""
        return dequantize_weight(
            self.packed, self.scale, self.zero_point, self.bits, self.group_size, self.in_features, dtype
        )

    def sqnr_db(self, weight: Tensor) -> float:
        """:func:`sqnr_db` of these codes against the weight `[out, in_features]` that they stand for."""

        def energies(values: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor) -> tuple[float, float]:
            grid = self.bits, self.group_size, self.in_features, values.dtype
            return _energies(values.flatten(), dequantize_weight(packed, scale, zero_point, *grid).flatten())

        slices = _slices(weight.detach())
        fields = ([*field.split(len(slices[0]))] for field in (self.packed, self.scale, self.zero_point))
        return _decibels(_map(energies, list(zip(slices, *fields, strict=True))))


def quantize_weight(
    weight: Tensor,
    *,
    bits: int,
    group_size: int = 0,
    symmetric: bool = False,
    method: RangeMethod = "minmax",
    importance: Tensor | None = None,
) -> QuantizedWeight:
    """Round a weight to the nearest code, on a grid of its own for each output channel or group of input channels.

    Args:
        weight: `[out, in]`, any float dtype, finite (see :func:`require_finite`); may be fake or meta.
        bits: Bits a code, 2 to 8.
        group_size: Input channels that share a grid; 0 for all of them.
        symmetric: Fix zero points at `2**(bits - 1)`.
        method: How the ranges are chosen, see :func:`weight_range`.
        importance: `[in]`, how much an error in each column matters to the searches: the mean square of that input
            channel, for the error of the layer's output; all columns alike if None.

    Returns:
        The packed codes with their scales and zero points.

    Raises:
        ConfigurationError: `bits` is not in 2..8, `method` is unknown, `weight` is not a matrix, or `group_size` does
            not divide its columns.
    """
    scale, zero_point = weight_grid(
        weight, bits=bits, group_size=group_size, symmetric=symmetric, method=method, importance=importance
    )
    (out_features, in_features), groups = weight.shape, scale.shape[1]
    rows = weight.detach().reshape(out_features * groups, in_features // groups)

    def round_rows(values: Tensor, step: Tensor, offset: Tensor) -> Tensor:
        return quantize(values, step[:, None], offset[:, None], 0, 2**bits - 1).to(torch.uint8)

    # In slices as all else that is done to weights: temporaries of the size of the weight would add to the peak.
    slices = _slices(rows)
    grids = (grid.flatten().split(len(slices[0])) for grid in (scale, zero_point))
    codes = torch.cat(_map(round_rows, list(zip(slices, *grids, strict=True))))
    return QuantizedWeight.from_codes(
        codes.reshape(out_features, in_features), scale, zero_point, bits=bits, group_size=group_size
    )


def weight_grid(
    weight: Tensor,
    *,
    bits: int,
    group_size: int = 0,
    symmetric: bool = False,
    method: RangeMethod = "minmax",
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The grids on which a weight is rounded, however each element then is.

    Arguments and errors are those of :func:`quantize_weight`.

    Returns:
        Scale, float32, and zero point, uint8, `[out, groups]`.
    """
    check_bits(bits)
    if weight.dim() != 2:
        raise ConfigurationError(f"a weight to quantize is a matrix [out, in], not of shape {tuple(weight.shape)}.")
    out_features, in_features = weight.shape
    groups = group_count(in_features, group_size)
    rows = weight.detach().reshape(out_features * groups, in_features // groups)
    if importance is not None:
        importance = importance.reshape(groups, -1)
        importance = importance if groups == 1 else importance.repeat(out_features, 1)
    scale, zero_point = affine_parameters(*weight_range(rows, bits, method, symmetric, importance), bits, symmetric)
    return scale.reshape(out_features, groups), zero_point.reshape(out_features, groups)


def dequantize_weight(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """`scale * (q - zero_point)` of the codes of a :class:`QuantizedWeight`, given field by field.

    Returns:
        `[out, in_features]` of `dtype`, computed in float32, in float64 if `dtype` is float64.

    Raises:
        ConfigurationError: The fields contradict each other.
    """
    compute = compute_dtype(dtype)
    groups = group_count(in_features, group_size)
    codes = unpack(packed, bits, in_features).to(compute).unflatten(1, (groups, in_features // groups))
    values = (codes - zero_point.to(compute)[..., None]) * scale.to(compute)[..., None]
    return values.flatten(1).to(dtype)


def group_count(in_features: int, group_size: int) -> int:
    """Groups that a row of `in_features` falls into; one if `group_size` is 0.

    Raises:
        ConfigurationError: `group_size` is negative or does not divide `in_features`.
    """
    if group_size == 0:
        return 1
    if group_size < 0 or in_features % group_size:
        raise ConfigurationError(
            f"group_size={group_size} does not divide the {in_features} input channels. "
            "Choose a divisor, or 0 for one group a row."
        )
    return in_features // group_size


def _slices(tensor: Tensor) -> Sequence[Tensor]:
    """Slices along the first axis, small enough for a processor's cache, large enough to fill a GPU."""
    if is_fake(tensor) or tensor.is_meta:
        return [tensor]
    elements = 1 << 18 if tensor.device.type == "cpu" else 1 << 24
    return tensor.split(max(1, elements // max(1, tensor[:1].numel())))


def _map(function: Callable[..., T], slices: Sequence[tuple[Tensor | None, ...]]) -> list[T]:
    """Call a function on each slice, on the processor one slice a thread.

    Left to torch, each of the many small ops would be a parallel region, at whose end all threads wait for the slowest:
    several times slower where the cores are shared.
    """
    threads = torch.get_num_threads()
    first = slices[0][0] if slices else None
    if threads == 1 or len(slices) < 2 or first is None or first.device.type != "cpu":
        return [function(*piece) for piece in slices]
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(lambda piece: function(*piece), slices))
    finally:
        torch.set_num_threads(threads)


def _check_method(method: str) -> None:
    if method not in get_args(RangeMethod):
        raise ConfigurationError(f"unknown range method {method!r}. Known: {', '.join(get_args(RangeMethod))}.")


def _extremes(rows: Tensor) -> tuple[Tensor, Tensor]:
    # Two passes, yet ten times faster on a processor than torch.aminmax along an axis, which is not vectorised.
    return rows.amin(1), rows.amax(1)


def _at(ordered: Tensor, share: float) -> float:
    """The quantile of sorted values, with linear interpolation; `torch.quantile` stops at 16 million values."""
    position = share * (ordered.numel() - 1)
    below = math.floor(position)
    above = min(below + 1, ordered.numel() - 1)
    low, high = ordered[below].item(), ordered[above].item()
    return float(low + (position - below) * (high - low))


def _sorted_errors(ordered: Tensor, lows: Tensor, highs: Tensor, bits: int) -> Tensor:
    """Mean squared errors of quantizing `ordered`, float64 `[n]` ascending, to the grids of ranges `[candidates]`.

    The values that share a code are a run of the sorted samples, and their squared error follows from the run's count,
    sum and sum of squares. So a candidate costs 2**bits binary searches, however many samples there are.
    """
    scale, zero_point = affine_parameters(lows, highs, bits)
    codes = torch.arange(2**bits, dtype=torch.float64, device=ordered.device)
    levels = (codes - zero_point[:, None].to(torch.float64)) * scale[:, None].to(torch.float64)
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
    bits: int,
    symmetric: bool,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """For each row of `values` `[rows, n]` the candidate with the lowest squared error, the first of those that tie."""
    share = None if importance is None else importance.to(values.dtype)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for low, high in candidates:
        scale, zero_point = affine_parameters(low, high, bits, symmetric)
        offset, step = zero_point[:, None].to(values.dtype), scale[:, None].to(values.dtype)
        # In place, which is twice as fast as new tensors.
        squares = quantize(values, step, offset, 0, 2**bits - 1).sub_(offset).mul_(step).sub_(values).square_()
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
