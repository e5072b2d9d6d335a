"""The numbers that codes of float formats stand for before they are scaled, and the codes of numbers.

An element has no scale: it maps a number to the nearest code of its grid, halves to the even code, and a code to its
number. Numbers beyond the largest saturate, infinity too. NaN has a code only in formats of 8 bits.
"""

from __future__ import annotations

import itertools
from typing import Protocol

import torch
from torch import Tensor

from fxquant.numerics.slices import is_without_values


class Element(Protocol):
    """A grid of numbers.

    Attributes:
        bits: Bits per code.
        largest: The largest number.
    """

    bits: int
    largest: float

    def encode(self, x: Tensor) -> Tensor:
        """The codes of the nearest numbers, uint8 of the shape of ``x``, which is float32 or float64."""

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """The numbers of uint8 codes, float32 or float64."""


class TorchElement:
    """Numbers of one of torch's 8-bit floating-point dtypes; a code is their byte.

    Args:
        dtype: ``torch.float8_e4m3fn`` (up to 448, no infinity) or ``torch.float8_e5m2`` (up to 57,344).
    """

    bits = 8

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.largest = torch.finfo(dtype).max

    def encode(self, x: Tensor) -> Tensor:
        # The clamp leaves NaN alone, whose code is that of the dtype. Casts of torch to e5m2 do not saturate.
        return x.clamp(-self.largest, self.largest).to(self.dtype).view(torch.uint8)

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return codes.view(self.dtype).to(dtype)


class SmallFloat:
    """Floats of up to 6 bits without infinity and NaN, as in the OCP MX specification: e2m1, e2m3, e3m2.

    The code is sign, exponent and mantissa from the highest bit to the lowest. The bias is ``2**(e - 1) - 1``.

    Args:
        exponent_bits: Bits of the exponent, e.
        mantissa_bits: Bits of the mantissa, m.
    """

    def __init__(self, exponent_bits: int, mantissa_bits: int) -> None:
        self.bits = 1 + exponent_bits + mantissa_bits
        steps, bias = 2**mantissa_bits, 2 ** (exponent_bits - 1) - 1
        self._numbers = [
            (code % steps) / steps * 2.0 ** (1 - bias)
            if code < steps
            else (1 + (code % steps) / steps) * 2.0 ** (code // steps - bias)
            for code in range(2 ** (self.bits - 1))
        ]
        self.largest = self._numbers[-1]

    def encode(self, x: Tensor) -> Tensor:
        if is_without_values(x):
            return torch.empty_like(x, dtype=torch.uint8)
        magnitude = torch.bucketize(x.abs(), _boundaries(self._numbers, x), out_int32=True).to(torch.uint8)
        return magnitude | (torch.signbit(x).to(torch.uint8) << (self.bits - 1))

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        if is_without_values(codes):
            return torch.empty_like(codes, dtype=dtype)
        numbers = [*self._numbers, *(-number for number in self._numbers)]
        return torch.tensor(numbers, dtype=dtype, device=codes.device)[codes.int()]


class Levels:
    """Any ascending numbers, with their positions as codes.

    Args:
        numbers: The numbers, ascending; as many as there are codes.
    """

    def __init__(self, numbers: list[float]) -> None:
        self.bits = (len(numbers) - 1).bit_length()
        self._numbers = numbers
        self.largest = max(map(abs, numbers))

    def encode(self, x: Tensor) -> Tensor:
        if is_without_values(x):
            return torch.empty_like(x, dtype=torch.uint8)
        middles = [(low + high) / 2 for low, high in itertools.pairwise(self._numbers)]
        return torch.bucketize(x, torch.tensor(middles, dtype=x.dtype, device=x.device), out_int32=True).to(torch.uint8)

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        if is_without_values(codes):
            return torch.empty_like(codes, dtype=dtype)
        return torch.tensor(self._numbers, dtype=dtype, device=codes.device)[codes.int()]


def _boundaries(numbers: list[float], x: Tensor) -> Tensor:
    """For ascending numbers, the largest value that still has each code but the last; halves go to the even code."""
    middles = torch.tensor(
        [(low + high) / 2 for low, high in itertools.pairwise(numbers)], dtype=x.dtype, device=x.device
    )
    # Between an odd code and the next one, the half itself belongs to the next one.
    below = torch.nextafter(middles, torch.zeros_like(middles))
    return torch.where(torch.arange(len(middles), device=x.device) % 2 == 0, middles, below)
