"""Quantized weights: packed codes and their scales, rounding to nearest, and dequantization."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fxquant.errors import ConfigurationError
from fxquant.numerics.formats import FORMATS, Format, Scales
from fxquant.numerics.packing import check_bits, pack, packed_size, unpack
from fxquant.numerics.ranges import RangeMethod, check_method, weight_range
from fxquant.numerics.slices import map_slices, slices_of
from fxquant.numerics.sqnr import decibels, energies_of


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight matrix as packed codes and scales.

    Attributes:
        packed: uint8 `[out, packed_size(in_features, bits)]`.
        scale: The scales, `[rows, groups]` of the format's `scale_dtype`; `rows` is `out`, or fewer if several output
            channels share a scale.
        zero_point: uint8 of the shape of `scale`; None for formats without zero points.
        format: Name of the number format.
        group_size: Input channels that share a scale; 0 for all of them.
        in_features: Codes per row.
        global_scale: float32, 0-d; None for formats without one.
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    format: str
    group_size: int
    in_features: int
    global_scale: Tensor | None = None

    @classmethod
    def from_codes(cls, codes: Tensor, scales: Scales, *, format: str, group_size: int) -> QuantizedWeight:
        """Pack codes uint8 `[out, in]` that were decided elsewhere, for example by an adaptive rounding method.

        Raises:
            ConfigurationError: As :func:`encode_weight`, or the codes are not uint8.
        """
        group_count(codes.shape[1], group_size)
        packed = pack(codes, FORMATS[format].bits)
        parts = scales.scale, scales.zero_point, format, group_size, codes.shape[1], scales.global_scale
        return cls(packed, *parts)

    @property
    def bits(self) -> int:
        """Bits per code, 2 to 8."""
        return FORMATS[self.format].bits

    @property
    def scales(self) -> Scales:
        """Scales, zero points and the scale of the scales."""
        return Scales(self.scale, self.zero_point, self.global_scale)

    def codes(self) -> Tensor:
        """The codes, uint8 `[out, in_features]`."""
        return unpack(self.packed, self.bits, self.in_features)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The values of the codes, `[out, in_features]` of `dtype`, computed in float32, in float64 for float64."""
        return dequantize_weight(self.packed, self.scales, self.format, self.group_size, self.in_features, dtype)

    def sqnr_db(self, weight: Tensor) -> float:
        """:func:`sqnr_db` of these codes against the weight `[out, in_features]` that they stand for."""
        # Slices hold whole blocks of output channels that share a scale.
        share = len(weight) // max(1, len(self.scale))
        pieces = slices_of(weight.detach().reshape(max(1, len(self.scale)), -1))
        counts = [len(piece) for piece in pieces]
        values = [piece.reshape(-1, self.in_features) for piece in pieces]
        packed = self.packed.split([count * share for count in counts])
        scale = self.scale.split(counts)
        zeros = [None] * len(counts) if self.zero_point is None else [*self.zero_point.split(counts)]

        def energies(exact: Tensor, codes: Tensor, step: Tensor, zero: Tensor | None) -> tuple[float, float]:
            scales = Scales(step, zero, self.global_scale)
            grid = self.format, self.group_size, self.in_features, exact.dtype
            return energies_of(exact.flatten(), dequantize_weight(codes, scales, *grid).flatten())

        return decibels(map_slices(energies, list(zip(values, packed, scale, zeros, strict=True))))


def quantize_weight(
    weight: Tensor,
    *,
    bits: int,
    group_size: int = 0,
    symmetric: bool = False,
    method: RangeMethod = "minmax",
    importance: Tensor | None = None,
) -> QuantizedWeight:
    """:func:`encode_weight` to integers of `bits` bits, 2 to 8."""
    check_bits(bits)
    return encode_weight(
        weight,
        format=f"int{bits}",
        group_size=group_size,
        symmetric=symmetric,
        method=method,
        importance=importance,
    )


def encode_weight(
    weight: Tensor,
    *,
    format: str,
    group_size: int = 0,
    group_rows: int = 1,
    symmetric: bool = False,
    method: RangeMethod = "minmax",
    importance: Tensor | None = None,
) -> QuantizedWeight:
    """Round a weight to the nearest code. Each output channel, or each group of its input channels, has its own scale.

    Args:
        weight: `[out, in]`, any float dtype, finite (see :func:`require_finite`); may be fake or meta.
        format: Name of the number format.
        group_size: Input channels that share a scale; 0 for all of them. For formats with blocks, the block.
        group_rows: Output channels that share a scale; 0 for all of them.
        symmetric: Fix zero points at the middle code.
        method: How the ranges are chosen, see :func:`weight_range`.
        importance: `[in]`, the weight of each column's error in the searches: the mean square of that input channel,
            to measure the error of the layer's output. All columns count equally if None.

    Returns:
        The packed codes with their scales.

    Raises:
        ConfigurationError: `format` or `method` is unknown, `weight` is not a matrix, or the groups do not divide its
            columns or rows, or are not the format's blocks.
    """
    kind = FORMATS[format]
    if weight.is_meta or isinstance(weight, FakeTensor):
        return _without_values(weight, kind, group_size, group_rows, method)
    scales = weight_scales(
        weight,
        format=format,
        group_size=group_size,
        group_rows=group_rows,
        symmetric=symmetric,
        method=method,
        importance=importance,
    )
    blocks = _blocks(weight.detach(), *scales.scale.shape)

    def round_rows(values: Tensor, step: Tensor, offset: Tensor | None) -> Tensor:
        zero_point = None if offset is None else offset[:, None]
        return kind.encode(values, Scales(step[:, None], zero_point, scales.global_scale))

    # In slices, as in all work on weights: temporaries of the size of the weight would raise the peak memory.
    slices = slices_of(blocks)
    size = len(slices[0])
    steps = scales.scale.flatten().split(size)
    offsets = [None] * len(steps) if scales.zero_point is None else [*scales.zero_point.flatten().split(size)]
    codes = torch.cat(map_slices(round_rows, list(zip(slices, steps, offsets, strict=True))))
    return QuantizedWeight.from_codes(
        _rows(codes, weight.shape, *scales.scale.shape), scales, format=format, group_size=group_size
    )


def _without_values(
    weight: Tensor, kind: Format, group_size: int, group_rows: int, method: RangeMethod
) -> QuantizedWeight:
    """The codes and scales of a fake or meta weight: only their shapes and dtypes are known, by whatever method.

    A plan is replayed on such weights when a checkpoint is loaded. Rounding them op by op took a third of that time.
    """
    check_method(method)
    out_features, in_features, rows, groups = _layout(weight, kind, group_size, group_rows)
    packed = weight.new_empty((out_features, packed_size(in_features, kind.bits)), dtype=torch.uint8)
    scale = weight.new_empty((rows, groups), dtype=kind.scale_dtype)
    zero_point = weight.new_empty((rows, groups), dtype=torch.uint8) if kind.zero_points else None
    global_scale = weight.new_empty((), dtype=torch.float32) if kind.global_scales else None
    return QuantizedWeight(packed, scale, zero_point, kind.name, group_size, in_features, global_scale)


def _layout(weight: Tensor, kind: Format, group_size: int, group_rows: int) -> tuple[int, int, int, int]:
    """Output and input channels of a weight, and the rows and columns of its scales."""
    if weight.dim() != 2:
        raise ConfigurationError(
            f"a weight to quantize must be a matrix [out, in], but has shape {tuple(weight.shape)}."
        )
    check_block(kind, group_size)
    out_features, in_features = weight.shape
    return out_features, in_features, row_count(out_features, group_rows), group_count(in_features, group_size)


def weight_scales(
    weight: Tensor,
    *,
    format: str,
    group_size: int = 0,
    group_rows: int = 1,
    symmetric: bool = False,
    method: RangeMethod = "minmax",
    importance: Tensor | None = None,
) -> Scales:
    """The scales on which a weight is rounded, whatever method then rounds its elements.

    Arguments and errors are those of :func:`encode_weight`.

    Returns:
        Scales and zero points `[rows, groups]`, and the scale of the scales, 0-d.
    """
    kind = FORMATS[format]
    out_features, _, rows, groups = _layout(weight, kind, group_size, group_rows)
    blocks = _blocks(weight.detach(), rows, groups)
    if importance is not None:
        importance = importance.reshape(groups, -1).repeat(1, out_features // max(1, rows))
        importance = importance if groups == 1 else importance.repeat(rows, 1)
    global_scale = None
    if kind.global_scales:
        global_scale = kind.global_scale(*(end.to(torch.float64) for end in torch.aminmax(blocks)))
    ends = weight_range(blocks, kind, method, symmetric, importance, global_scale)
    scales = kind.scales(*ends, symmetric=symmetric, global_scale=global_scale)
    zero_point = None if scales.zero_point is None else scales.zero_point.reshape(rows, groups)
    return Scales(scales.scale.reshape(rows, groups), zero_point, global_scale)


def dequantize_weight(
    packed: Tensor, scales: Scales, format: str, group_size: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """What the codes of a :class:`QuantizedWeight` stand for, given field by field.

    Returns:
        `[out, in_features]` of `dtype`, computed in float32, or in float64 if `dtype` is float64.

    Raises:
        ConfigurationError: The fields contradict each other.
    """
    kind = FORMATS[format]
    groups = group_count(in_features, group_size)
    codes = unpack(packed, kind.bits, in_features)
    rows = scales.scale.shape[0]
    blocks = codes.reshape(rows, codes.shape[0] // max(1, rows), groups, in_features // groups)
    step, zero = (None if part is None else part[:, None, :, None] for part in (scales.scale, scales.zero_point))
    assert step is not None
    values = kind.decode(blocks, Scales(step, zero, scales.global_scale), dtype)
    return values.reshape(codes.shape)


def group_count(in_features: int, group_size: int) -> int:
    """Number of groups in a row of `in_features`; one if `group_size` is 0.

    Raises:
        ConfigurationError: `group_size` is negative or does not divide `in_features`.
    """
    if group_size == 0:
        return 1
    if group_size < 0 or in_features % group_size:
        raise ConfigurationError(
            f"group_size={group_size} does not divide the {in_features} input channels. "
            "Choose a divisor, or 0 for one group per row."
        )
    return in_features // group_size


def row_count(out_features: int, group_rows: int) -> int:
    """Number of scales along `out_features` output channels; one if `group_rows` is 0.

    Raises:
        ConfigurationError: `group_rows` is negative or does not divide `out_features`.
    """
    if group_rows == 0:
        return min(1, out_features)
    if group_rows < 0 or out_features % group_rows:
        raise ConfigurationError(
            f"blocks of {group_rows} output channels do not divide the {out_features} output channels. Choose a "
            "divisor, 1 for a scale per channel, or 0 for one scale."
        )
    return out_features // group_rows


def check_block(format: Format, group_size: int) -> None:
    """Refuse groups of a weight in a format that has blocks of its own.

    Raises:
        ConfigurationError: `group_size` is not the format's block.
    """
    if format.block and group_size != format.block:
        raise ConfigurationError(
            f"{format.name} has a scale per {format.block} input channels, so group_size is {format.block}, not "
            f"{group_size}."
        )


def stored_shapes(
    format: Format, shape: tuple[int, int], group_size: int, group_rows: int = 1
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of the tensors that store a weight, by name: ``packed``, ``scale``, and what the format has.

    Args:
        format: Its number format.
        shape: Output and input channels.
        group_size: Input channels per scale; 0 for all.
        group_rows: Output channels per scale; 0 for all.

    Raises:
        ConfigurationError: The groups do not divide the shape.
    """
    grid = row_count(shape[0], group_rows), group_count(shape[1], group_size)
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "packed": (torch.uint8, (shape[0], packed_size(shape[1], format.bits))),
        "scale": (format.scale_dtype, grid),
    }
    if format.zero_points:
        found["zero_point"] = torch.uint8, grid
    if format.global_scales:
        found["global_scale"] = torch.float32, ()
    return found


def stored_bytes(format: Format, shape: tuple[int, int], group_size: int, group_rows: int = 1) -> int:
    """Bytes of a stored weight with its scales; arguments and errors as for :func:`stored_shapes`."""
    parts = stored_shapes(format, shape, group_size, group_rows).values()
    return sum(dtype.itemsize * math.prod(size) for dtype, size in parts)


def _blocks(weight: Tensor, rows: int, groups: int) -> Tensor:
    """The elements that share a scale, `[rows * groups, elements]`, from a weight `[out, in]`."""
    out_features, in_features = weight.shape
    if rows == out_features:
        return weight.reshape(rows * groups, in_features // groups)
    parts = weight.reshape(rows, out_features // rows, groups, in_features // groups)
    return parts.transpose(1, 2).reshape(rows * groups, -1)


def _rows(blocks: Tensor, shape: torch.Size, rows: int, groups: int) -> Tensor:
    """Undo :func:`_blocks`."""
    if rows == shape[0]:
        return blocks.reshape(shape)
    parts = blocks.reshape(rows, groups, shape[0] // rows, shape[1] // groups)
    return parts.transpose(1, 2).reshape(shape)
