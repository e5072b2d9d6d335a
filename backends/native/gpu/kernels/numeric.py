"""Arithmetic that several kernels share."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fxquant.backends.native.gpu.machine import interprets

FP8_MAX = tl.constexpr(448.0)
MIDDLE = tl.constexpr(128)
_ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2**23: what is added to it keeps no bit behind the point.
_BOUND = tl.constexpr(1048576.0)
_ROUNDER_64 = tl.constexpr(1.5 * 2.0**52)
_LEAST_SCALE = tl.constexpr(float(torch.finfo(torch.float32).tiny))
_MOST_SCALE = tl.constexpr(float(torch.finfo(torch.float32).max))
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
    return _held(y * inverse, zero_point, qmax, FP8)


@triton.jit
def exact_codes(y, step, zero_point, qmax, FP8: tl.constexpr):
    """The same of values and their steps, of one shape, divided as the reference does: bit for bit its codes."""
    return _held(tl.math.div_rn(y, step), zero_point, qmax, FP8)


@triton.jit
def _held(steps, zero_point, qmax, FP8: tl.constexpr):
    if FP8:
        held = to_fp8(steps)
    else:
        codes = round_even(steps).to(tl.int32) + zero_point
        held = (tl.minimum(tl.maximum(codes, 0), qmax) - MIDDLE).to(tl.int8)
    return held


@triton.jit
def token_grid(low, high, qmax):
    """Scale and zero point of the range of a row, computed as ``affine_parameters`` of the reference does."""
    low = tl.minimum(low, 0.0).to(tl.float64)
    high = tl.maximum(high, 0.0).to(tl.float64)
    step = (high - low) / qmax.to(tl.float64)
    bounded = tl.minimum(tl.maximum(step, _LEAST_SCALE), _MOST_SCALE)
    scale = tl.where(step == 0.0, 1.0, bounded).to(tl.float32)
    zero_point = ((-low / scale.to(tl.float64)) + _ROUNDER_64) - _ROUNDER_64
    return scale, tl.minimum(tl.maximum(zero_point, 0.0), qmax.to(tl.float64)).to(tl.int32)


@triton.jit
def dot_codes(values, codes):
    """The product of floats and whole numbers of up to 256, which all dtypes of floats hold, summed in float32.

    Products of float32 are three of tf32 each, which tensor cores make and which lose next to nothing.
    """
    if _INTERPRETED:
        values = values.to(tl.float32)  # The interpreter multiplies the bits of bfloat16.
    return tl.dot(values, codes.to(tl.float32).to(values.dtype), input_precision="tf32x3")


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """``none``, ``silu`` or ``gelu_tanh``, float32."""
    if ACTIVATION == "silu":
        y = y * tl.sigmoid(y)
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 is the sigmoid of 2 u.
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    return y
