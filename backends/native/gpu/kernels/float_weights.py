"""The matrix product of float activations and weights in float formats of 4 to 8 bits."""

from __future__ import annotations

import triton
import triton.language as tl

from fxquant.backends.native.gpu.kernels.numeric import dot_floats


@triton.jit
def float_weight_kernel(
    x,
    w,
    out,
    w_scale,
    w_global,
    numbers,
    bias,
    M,
    N,
    K,
    EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    SCALES: tl.constexpr,
    HALF: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute one tile `[BLOCK_M, BLOCK_N]` of the result.

    ``x`` is `[M, K]` of any float dtype. ``w`` holds codes as for ``weight_only_kernel``, unchanged, with one byte per
    code if HALF is 0. An element is looked up in ``numbers``, float32 `[16]`, or is a float of EXPONENT and MANTISSA
    bits if that is None. SCALES says how ``w_scale`` `[N, groups]` is stored: ``float32``, ``e8m0`` or ``e4m3``; the
    last is multiplied by ``w_global``, float32 `[1]`. Weights are multiplied as the reference decodes them: scaled in
    float32 and rounded to the dtype of ``x``.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Indices outside wrap around to indices inside, and their results are not written: loads along these axes need
    # no mask.
    inside_n = (columns % N).to(tl.int64)
    x_rows = x + (rows % M).to(tl.int64)[:, None] * K
    groups = tl.cdiv(K, GROUP) if GROUP > 0 else 1
    grid = w_scale + inside_n * groups
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if HALF > 0:
        inner = tl.arange(0, HALF)
        w_tile = w + inside_n[None, :] * (tl.cdiv(K, 2 * HALF) * HALF) + inner[:, None]
        for k in range(0, K, 2 * HALF):
            both = tl.load(w_tile + k // 2)
            first = _weights(both & 15, grid, k, groups, w_global, numbers, EXPONENT, MANTISSA, SCALES, GROUP, HALF)
            total += _product(x_rows, k, K, first, HALF)
            second = _weights(
                both >> 4, grid, k + HALF, groups, w_global, numbers, EXPONENT, MANTISSA, SCALES, GROUP, HALF
            )
            total += _product(x_rows, k + HALF, K, second, HALF)
    else:
        inner = tl.arange(0, BLOCK_K)
        w_tile = w + inside_n[None, :] * K + inner[:, None]
        for k in range(0, K, BLOCK_K):
            codes = tl.load(w_tile + k, mask=(inner < K - k)[:, None], other=0)
            real = _weights(codes, grid, k, groups, w_global, numbers, EXPONENT, MANTISSA, SCALES, GROUP, BLOCK_K)
            total += _product(x_rows, k, K, real, BLOCK_K)
    if bias is not None:
        total += tl.load(bias + inside_n).to(tl.float32)[None, :]
    place = rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :])


@triton.jit
def _product(x_rows, k, K, weights, STEP: tl.constexpr):
    inner = k + tl.arange(0, STEP)
    values = tl.load(x_rows + inner[None, :], mask=(inner < K)[None, :], other=0.0)
    return dot_floats(values, weights)


@triton.jit
def _weights(
    codes,
    grid,
    k,
    groups,
    w_global,
    numbers,
    EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    SCALES: tl.constexpr,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,
):
    """The weights `[STEP, N]` from input ``k`` on, float32. A step lies in one group, or holds whole groups."""
    if numbers is not None:
        elements = tl.load(numbers + codes.to(tl.int32))
    else:
        elements = _elements(codes.to(tl.int32), EXPONENT, MANTISSA)
    # The last step may reach beyond the end. Its inputs are zero, so any existing group serves.
    if GROUP == 0 or GROUP >= STEP:
        group = tl.minimum(k // GROUP, groups - 1) if GROUP > 0 else 0
        scales = _scales(tl.load(grid + group), w_global, SCALES)[None, :]
    else:
        each = tl.minimum(k // GROUP + tl.arange(0, STEP // GROUP), groups - 1)
        found = _scales(tl.load(grid[None, :] + each[:, None]), w_global, SCALES)
        shape: tl.constexpr = (STEP // GROUP, GROUP, found.shape[1])
        scales = tl.reshape(tl.broadcast_to(found[:, None, :], shape), elements.shape)
    return elements * scales


@triton.jit
def _elements(codes, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr):
    """The numbers of codes, int32, of up to 8 bits.

    Moved into the place of a half, which has 10 bits of mantissa and the bias 15, their bits are a half that is too
    small by a constant power of two.
    """
    magnitude = codes & ((1 << (EXPONENT + MANTISSA)) - 1)
    sign = (codes >> (EXPONENT + MANTISSA)) & 1
    half = ((magnitude << (10 - MANTISSA)) | (sign << 15)).to(tl.int16).to(tl.float16, bitcast=True)
    power: tl.constexpr = 1 << (15 - ((1 << (EXPONENT - 1)) - 1))
    number = half.to(tl.float32) * power
    if EXPONENT == 4 and MANTISSA == 3:
        number = tl.where(magnitude == 0x7F, float("nan"), number)
    return number


@triton.jit
def _scales(stored, w_global, SCALES: tl.constexpr):
    """Stored scales as float32."""
    if SCALES == "e8m0":  # 2**(code - 127), of which 2**-127 has no exponent; 255 is NaN.
        codes = stored.to(tl.int32)
        bits = tl.where(codes == 0, 1 << 22, codes << 23)
        scales = tl.where(codes == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)
    elif SCALES == "e4m3":
        scales = _elements(stored.to(tl.int32), 4, 3) * tl.load(w_global)
    else:
        scales = stored
    return scales
