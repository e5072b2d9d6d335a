"""Integers of 2 to 8 bits with a scale and a zero point."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.numerics.formats.format import Format, Scales
from fxquant.numerics.grids import affine_parameters, compute_dtype, quantize
from fxquant.numerics.packing import MAX_BITS, MIN_BITS, check_bits


class Integer(Format):
    """Unsigned integers: a code q stands for ``scale * (q - zero_point)``. See :mod:`fxquant.numerics.grids`.

    Args:
        bits: Bits per code, 2 to 8.
    """

    zero_points = True

    def __init__(self, bits: int) -> None:
        check_bits(bits)
        self.bits = bits
        self.name = f"int{bits}"

    @property
    def top(self) -> int:
        """The highest code."""
        return int(2**self.bits - 1)

    def values(self) -> Tensor:
        return torch.arange(2**self.bits, dtype=torch.float32)

    def scales(
        self, low: Tensor, high: Tensor, *, symmetric: bool = False, global_scale: Tensor | None = None
    ) -> Scales:
        return Scales(*affine_parameters(low, high, self.bits, symmetric))

    def encode(self, x: Tensor, scales: Scales) -> Tensor:
        assert scales.zero_point is not None
        return quantize(x, scales.scale, scales.zero_point, 0, self.top).to(torch.uint8)

    def round(self, x: Tensor, scales: Scales) -> Tensor:
        assert scales.zero_point is not None
        dtype = compute_dtype(x.dtype)
        offset, step = scales.zero_point.to(dtype), scales.scale.to(dtype)
        # In place, without codes in bytes: twice as fast.
        return quantize(x, step, offset, 0, self.top).sub_(offset).mul_(step).to(x.dtype)

    def decode(self, codes: Tensor, scales: Scales, dtype: torch.dtype) -> Tensor:
        assert scales.zero_point is not None
        inner = compute_dtype(dtype)
        return ((codes.to(inner) - scales.zero_point.to(inner)) * scales.scale.to(inner)).to(dtype)


INT2, INT3, INT4, INT5, INT6, INT7, INT8 = map(Integer, range(MIN_BITS, MAX_BITS + 1))
