"""Grids of integer codes: scale, zero point, and rounding to the nearest code.

The integer grid: a code q is an unsigned integer in `0..2**bits - 1` and stands for `scale * (q - zero_point)`. The
zero point is itself a code, so zero is always exact. *Asymmetric* grids place it anywhere; *symmetric* ones fix it at
`2**(bits - 1)`.

All functions for weights also run on fake and meta tensors and never branch on their values, because passes are
replayed on models without weights. Only :func:`~fxquant.numerics.finite.require_finite` reads values, and it skips fake
and meta tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.numerics.packing import check_bits


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of `dtype` are quantized: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def affine_parameters(
    lo: Tensor | float, hi: Tensor | float, bits: int, symmetric: bool = False
) -> tuple[Tensor, Tensor]:
    """The grid that covers a range.

    The range is widened to include 0. The zero point is computed from the scale after its rounding to float32, so that
    the two are consistent. A range of exactly 0 gets scale 1. A range that is too narrow for a normal float32 scale
    gets the smallest normal float32 scale.

    Args:
        lo: Lowest values, any float dtype and shape.
        hi: Highest values, of the same shape.
        bits: Bits per code, 2 to 8.
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
    # In place, because the quotient is a new tensor and weights are large.
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
