"""Arithmetic that several kernels share."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fxquant.backends.native.gpu.machine import interprets

FP8_MAX = tl.constexpr(448.0)
MIDDLE = tl.constexpr(128)
_ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it to a float32 rounds away all fractional bits.
_BOUND = tl.constexpr(1048576.0)
_ROUNDER_64 = tl.constexpr(1.5 * 2.0**52)
_LEAST_SCALE = tl.constexpr(float(torch.finfo(torch.float32).tiny))
_MOST_SCALE = tl.constexpr(float(torch.finfo(torch.float32).max))
_INTERPRETED = tl.constexpr(interprets())


@triton.jit
def round_even(x):
    """Round a float32 to the nearest integer, halves to even; values are clamped to +-2**20 first."""
    bounded = tl.minimum(tl.maximum(x, -_BOUND), _BOUND)
    return (bounded + _ROUNDER) - _ROUNDER


@triton.jit
def to_fp8(y):
    """Round float32 values to the nearest 8-bit floats (e4m3); values beyond the largest are clamped to it.

    NaN stays NaN.
    """
    unknown = y != y
    y = tl.where(unknown, y, tl.minimum(tl.maximum(y, -FP8_MAX), FP8_MAX))
    if _INTERPRETED:
        # The interpreter loses the carry of a mantissa that rounds up to the next power of two, so round here first.
        bits = y.to(tl.int32, bitcast=True)
        sign = (bits >> 24) & 128
        nearest = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        y = tl.where(tl.abs(y) < 0.015625, round_even(y * 512.0) / 512.0, nearest)
    held = y.to(tl.float8e4nv)
    if _INTERPRETED:
        # It also makes a number of NaN, and the rounding above lost the sign of values that become 0.
        code = (held.to(tl.uint8, bitcast=True).to(tl.int32) & 127) | sign
        held = tl.where(unknown, 127, code).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    return held


@triton.jit
def held_codes(y, inverse, zero_point, qmax, FP8: tl.constexpr):
    """Multiply values by the inverse of their step and store them as int8 codes minus 128, or as 8-bit floats."""
    return _held(y * inverse, zero_point, qmax, FP8)


@triton.jit
def exact_codes(y, step, zero_point, qmax, FP8: tl.constexpr):
    """As :func:`held_codes`, but divide by `step`, as the reference does; codes match it bit for bit.

    Values and steps have the same shape.
    """
    return _held(tl.math.div_rn(y, step), zero_point, qmax, FP8)


@triton.jit
def codes_of_rows(values, rows, inside, scale, zero_point, scale_rows, zero_point_rows, qmax, FP8: tl.constexpr):
    """Codes of a tile of these rows; ``*_rows`` is the number of rows that share an entry of the grid."""
    step = tl.load(scale + rows // scale_rows, mask=inside, other=1.0)
    if FP8:
        middle = tl.zeros((values.shape[0], 1), dtype=tl.int32)
    else:
        middle = tl.load(zero_point + rows // zero_point_rows, mask=inside, other=0).to(tl.int32)[:, None]
    return exact_codes(values, tl.broadcast_to(step[:, None], values.shape), middle, qmax, FP8)


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
    """Scale and zero point for the range of a row, computed as ``affine_parameters`` of the reference computes them."""
    low = tl.minimum(low, 0.0).to(tl.float64)
    high = tl.maximum(high, 0.0).to(tl.float64)
    step = (high - low) / qmax.to(tl.float64)
    bounded = tl.minimum(tl.maximum(step, _LEAST_SCALE), _MOST_SCALE)
    scale = tl.where(step == 0.0, 1.0, bounded).to(tl.float32)
    zero_point = ((-low / scale.to(tl.float64)) + _ROUNDER_64) - _ROUNDER_64
    return scale, tl.minimum(tl.maximum(zero_point, 0.0), qmax.to(tl.float64)).to(tl.int32)


@triton.jit
def token_step(low, high):
    """Scale of 8-bit floats for the range of a row, computed as the format ``fp8`` of the reference computes it."""
    step = tl.maximum(tl.maximum(-low, high), 0.0).to(tl.float64) / FP8_MAX
    return tl.where(step == 0.0, 1.0, tl.minimum(tl.maximum(step, _LEAST_SCALE), _MOST_SCALE)).to(tl.float32)


@triton.jit
def dot_codes(values, codes):
    """The product of floats and integers of up to 256, which all float dtypes represent exactly, summed in float32."""
    return dot_floats(values, codes.to(tl.float32))


@triton.jit
def dot_floats(values, weights):
    """The product of floats and float32 weights, rounded to the dtype of the floats, summed in float32.

    A product of float32 is computed as three products of tf32 on tensor cores, which loses almost no precision.
    """
    if _INTERPRETED:
        values = values.to(tl.float32)  # The interpreter multiplies the raw bits of bfloat16, and rounds towards zero.
    return tl.dot(values, weights.to(values.dtype), input_precision="tf32x3")


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """Apply the activation ``none``, ``silu`` or ``gelu_tanh`` in float32."""
    if ACTIVATION == "silu":
        y = y * tl.sigmoid(y)
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 is the sigmoid of 2 u.
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    return y
