"""The kernel that makes codes of block formats: MX formats and NVFP4."""

from __future__ import annotations

import triton
import triton.language as tl

from fxquant.backends.native.gpu.kernels.hadamard import walsh_hadamard
from fxquant.backends.native.gpu.kernels.numeric import to_fp8

_INFINITY = tl.constexpr(0x7F800000)
_E2M1_MAX = tl.constexpr(6.0)
_E4M3_LEAST = tl.constexpr(2.0**-6)
_NAN = tl.constexpr(255)


@triton.jit
def quantize_blocks_kernel(
    x,
    signs,
    codes,
    scales,
    global_scale,
    M,
    K,
    held,
    tiles,
    global_rows,
    FACTOR: tl.constexpr,
    STEPS: tl.constexpr,
    EXPONENT: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Codes and scales of ROWS rows and COLUMNS blocks of BLOCK channels each, of `[M, K]` values.

    With a global scale, scales are e4m3 times it (NVFP4). Without one they are powers of two (MX), and EXPONENT is that
    of the largest power of two of an element. Elements are e4m3 with FP8, else e2m1, two per byte. ``held`` is the
    number of bytes per row of codes. Scales are stored in tiles of 128 rows and 4 columns, ``tiles`` per 128 rows; rows
    and columns that tiles have beyond the values get the scale 0. Channels are rotated before as in
    ``hadamard_kernel``, unless ``signs`` is None.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    channels = tl.program_id(1) * (COLUMNS * BLOCK) + tl.arange(0, COLUMNS * BLOCK)
    inside = rows < M
    within = inside[:, None] & (channels < K)[None, :]
    y = tl.load(x + rows.to(tl.int64)[:, None] * K + channels[None, :], mask=within, other=0.0).to(tl.float32)
    if signs is not None:
        sign = tl.load(signs + channels, mask=channels < K, other=0).to(tl.float32)
        y = walsh_hadamard(y * (sign * FACTOR)[None, :], STEPS)
        y = y.to(x.dtype.element_ty).to(tl.float32)  # As if the rotated values were stored before.
    y = tl.reshape(y, (ROWS, COLUMNS, BLOCK))
    # As integers, magnitudes have the order of their values, and NaN is above infinity.
    top = tl.max(y.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 2)
    if global_scale is None:
        scale = tl.where(top > _INFINITY, _NAN, tl.maximum((top >> 23) - EXPONENT, 0))
        # The bits of 2**(127 - scale), by which a product is as exact as a quotient by 2**(scale - 127).
        inverse = tl.where(scale == _NAN, float("nan"), ((254 - scale) << 23).to(tl.float32, bitcast=True))
    else:
        outer = tl.load(global_scale + rows // global_rows, mask=inside, other=1.0)[:, None]
        outer = tl.broadcast_to(outer, (ROWS, COLUMNS))
        largest = top.to(tl.float32, bitcast=True)
        step = tl.math.div_rn(tl.math.div_rn(largest, tl.full((ROWS, COLUMNS), _E2M1_MAX, tl.float32)), outer)
        small = to_fp8(tl.where(step < _E4M3_LEAST, _E4M3_LEAST, step))
        scale = small.to(tl.uint8, bitcast=True).to(tl.int32)
        inverse = tl.math.div_rn(tl.math.div_rn(tl.full((ROWS, COLUMNS), 1.0, tl.float32), outer), small.to(tl.float32))
        inverse = tl.where(step != step, step, inverse)
    y = tl.reshape(y * inverse[:, :, None], (ROWS, COLUMNS * BLOCK))
    if FP8:
        tl.store(codes + rows.to(tl.int64)[:, None] * held + channels[None, :], to_fp8(y), mask=within)
    else:
        low, high = tl.split(tl.reshape(_to_e2m1(y), (ROWS, COLUMNS * BLOCK // 2, 2)))
        at = tl.program_id(1) * (COLUMNS * BLOCK // 2) + tl.arange(0, COLUMNS * BLOCK // 2)
        place = codes + rows.to(tl.int64)[:, None] * held + at[None, :]
        tl.store(place, (low | (high << 4)).to(tl.uint8), mask=inside[:, None] & (at < held)[None, :])
    known = inside[:, None] & (columns * BLOCK < K)[None, :]
    row, column = rows.to(tl.int64)[:, None], columns[None, :]
    place = (row // 128 * tiles + column // 4) * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4
    held_columns = tl.broadcast_to((columns < tiles * 4)[None, :], (ROWS, COLUMNS))
    tl.store(scales + place, tl.where(known, scale, 0).to(tl.uint8), mask=held_columns)


@triton.jit
def _to_e2m1(y):
    """The codes of the nearest numbers 0, 0.5, 1, 1.5, 2, 3, 4, 6 with a sign, halves to even codes, as int32."""
    size = tl.abs(y)
    # Comparisons are negated so that NaN has the code of 6, as in the reference.
    code = (~(size <= 0.25)).to(tl.int32) + (~(size < 0.75)).to(tl.int32) + (~(size <= 1.25)).to(tl.int32)
    code += (~(size < 1.75)).to(tl.int32) + (~(size <= 2.5)).to(tl.int32) + (~(size < 3.5)).to(tl.int32)
    code += (~(size <= 5.0)).to(tl.int32)
    return code | ((y.to(tl.int32, bitcast=True) >> 28) & 8)
