"""Quantized weights: packed codes and grids, rounding to nearest, and dequantization."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fxquant.errors import ConfigurationError
from fxquant.numerics.grids import affine_parameters, compute_dtype, quantize
from fxquant.numerics.packing import check_bits, pack, packed_size, unpack
from fxquant.numerics.ranges import RangeMethod, check_method, weight_range
from fxquant.numerics.slices import map_slices, slices_of
from fxquant.numerics.sqnr import decibels, energies_of


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight matrix as packed codes and grids.

    Attributes:
        packed: uint8 `[out, packed_size(in_features, bits)]`.
        scale: float32 `[out, groups]`.
        zero_point: uint8 `[out, groups]`.
        bits: Bits per code, 2 to 8.
        group_size: Input channels that share a grid; 0 for all of them.
        in_features: Codes per row.
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
            return energies_of(values.flatten(), dequantize_weight(packed, scale, zero_point, *grid).flatten())

        slices = slices_of(weight.detach())
        fields = ([*field.split(len(slices[0]))] for field in (self.packed, self.scale, self.zero_point))
        return decibels(map_slices(energies, list(zip(slices, *fields, strict=True))))


def quantize_weight(
    weight: Tensor,
    *,
    bits: int,
    group_size: int = 0,
    symmetric: bool = False,
    method: RangeMethod = "minmax",
    importance: Tensor | None = None,
) -> QuantizedWeight:
    """Round a weight to the nearest code. Each output channel, or each group of its input channels, has its own grid.

    Args:
        weight: `[out, in]`, any float dtype, finite (see :func:`require_finite`); may be fake or meta.
        bits: Bits per code, 2 to 8.
        group_size: Input channels that share a grid; 0 for all of them.
        symmetric: Fix zero points at `2**(bits - 1)`.
        method: How the ranges are chosen, see :func:`weight_range`.
        importance: `[in]`, the weight of each column's error in the searches: the mean square of that input channel,
            to measure the error of the layer's output. All columns count equally if None.

    Returns:
        The packed codes with their scales and zero points.

    Raises:
        ConfigurationError: `bits` is not in 2..8, `method` is unknown, `weight` is not a matrix, or `group_size` does
            not divide its columns.
    """
    if weight.is_meta or isinstance(weight, FakeTensor):
        return _without_values(weight, bits, group_size, method)
    scale, zero_point = weight_grid(
        weight, bits=bits, group_size=group_size, symmetric=symmetric, method=method, importance=importance
    )
    (out_features, in_features), groups = weight.shape, scale.shape[1]
    rows = weight.detach().reshape(out_features * groups, in_features // groups)

    def round_rows(values: Tensor, step: Tensor, offset: Tensor) -> Tensor:
        return quantize(values, step[:, None], offset[:, None], 0, 2**bits - 1).to(torch.uint8)

    # In slices, as in all work on weights: temporaries of the size of the weight would raise the peak memory.
    slices = slices_of(rows)
    grids = (grid.flatten().split(len(slices[0])) for grid in (scale, zero_point))
    codes = torch.cat(map_slices(round_rows, list(zip(slices, *grids, strict=True))))
    return QuantizedWeight.from_codes(
        codes.reshape(out_features, in_features), scale, zero_point, bits=bits, group_size=group_size
    )


def _without_values(weight: Tensor, bits: int, group_size: int, method: RangeMethod) -> QuantizedWeight:
    """The codes and grids of a fake or meta weight: only their shapes and dtypes are known, by whatever method.

    A plan is replayed on such weights when a checkpoint is loaded. Rounding them op by op took a third of that time.
    """
    check_bits(bits)
    check_method(method)
    out_features, in_features = _matrix_size(weight)
    grid = out_features, group_count(in_features, group_size)
    packed = weight.new_empty((out_features, packed_size(in_features, bits)), dtype=torch.uint8)
    scale = weight.new_empty(grid, dtype=torch.float32)
    zero_point = weight.new_empty(grid, dtype=torch.uint8)
    return QuantizedWeight(packed, scale, zero_point, bits, group_size, in_features)


def _matrix_size(weight: Tensor) -> tuple[int, int]:
    if weight.dim() != 2:
        raise ConfigurationError(
            f"a weight to quantize must be a matrix [out, in], but has shape {tuple(weight.shape)}."
        )
    out_features, in_features = weight.shape
    return out_features, in_features


def weight_grid(
    weight: Tensor,
    *,
    bits: int,
    group_size: int = 0,
    symmetric: bool = False,
    method: RangeMethod = "minmax",
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The grids on which a weight is rounded, whatever method then rounds its elements.

    Arguments and errors are those of :func:`quantize_weight`.

    Returns:
        Scale, float32, and zero point, uint8, `[out, groups]`.
    """
    check_bits(bits)
    out_features, in_features = _matrix_size(weight)
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
        `[out, in_features]` of `dtype`, computed in float32, or in float64 if `dtype` is float64.

    Raises:
        ConfigurationError: The fields contradict each other.
    """
    compute = compute_dtype(dtype)
    groups = group_count(in_features, group_size)
    codes = unpack(packed, bits, in_features).to(compute).unflatten(1, (groups, in_features // groups))
    values = (codes - zero_point.to(compute)[..., None]) * scale.to(compute)[..., None]
    return values.flatten(1).to(dtype)


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
