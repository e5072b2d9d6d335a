"""Arithmetic that several kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

from fxquant.backends.native.gpu.machine import interprets

FP8_MAX = tl.constexpr(448.0)
MIDDLE = tl.constexpr(128)
_ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2**23: what is added to it keeps no bit behind the point.
_BOUND = tl.constexpr(1048576.0)
_INTERPRETED = tl.constexpr(interprets())


@triton.jit
def round_even(x):
    """The nearest integer, halves to even, of a float32; what lies beyond 2**20 is cut off there."""
    bounded = tl.minimum(tl.maximum(x, -_BOUND), _BOUND)
    return (bounded + _ROUNDER) - _ROUNDER


@triton.jit
def step_of(scale, zero_point, qmax, FP8: tl.constexpr):
    """What one unit of a held value stands for: the scale, or that of 8-bit floats that span the same range."""
    if FP8:
        reach = tl.maximum(zero_point, qmax - zero_point).to(tl.float32)
        step = scale * reach / FP8_MAX
    else:
        step = scale
    return step


@triton.jit
def to_fp8(y):
    """The nearest 8-bit floats (e4m3) of float32 values; what lies beyond the largest is cut off there."""
    y = tl.minimum(tl.maximum(y, -FP8_MAX), FP8_MAX)
    if _INTERPRETED:
        # The interpreter loses the carry of a mantissa that rounds up to the next power of two, so none is left to it.
        bits = y.to(tl.int32, bitcast=True)
        nearest = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        y = tl.where(tl.abs(y) < 0.015625, round_even(y * 512.0) / 512.0, nearest)
    return y.to(tl.float8e4nv)


@triton.jit
def held_codes(y, inverse, zero_point, qmax, FP8: tl.constexpr):
    """Values times the inverse of their step as they are held: codes less 128 as int8, or 8-bit floats."""
    if FP8:
        held = to_fp8(y * inverse)
    else:
        codes = round_even(y * inverse).to(tl.int32) + zero_point
        held = (tl.minimum(tl.maximum(codes, 0), qmax) - MIDDLE).to(tl.int8)
    return held


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """``none``, ``silu`` or ``gelu_tanh``, float32."""
    if ACTIVATION == "silu":
        y = y * tl.sigmoid(y)
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 is the sigmoid of 2 u.
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    return y
