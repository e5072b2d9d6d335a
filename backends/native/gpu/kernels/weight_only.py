"""The matrix product of float activations and codes of weights."""

from __future__ import annotations

import triton
import triton.language as tl

from fxquant.backends.native.gpu.kernels.numeric import MIDDLE, dot_codes


@triton.jit
def weight_only_kernel(
    x,
    w,
    out,
    w_scale,
    w_zero_point,
    bias,
    M,
    N,
    K,
    WHOLE: tl.constexpr,
    HALF: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute one tile `[BLOCK_M, BLOCK_N]` of the result.

    ``x`` is `[M, K]` of any float dtype; ``w`` and its grid are as for ``linear_kernel``. With WHOLE, bytes of ``w``
    are 8-bit codes stored minus 128, not codes minus their zero point. Differences of codes are integers of up to 256,
    which every dtype of ``x`` represents exactly; scales multiply the sums of their products.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Indices outside wrap around to indices inside, and their results are not written: loads along these axes need
    # no mask.
    inside_n = (columns % N).to(tl.int64)
    x_rows = x + (rows % M).to(tl.int64)[:, None] * K
    groups = tl.cdiv(K, GROUP) if GROUP > 0 else 1
    grid = inside_n * groups
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if HALF > 0:
        inner = tl.arange(0, HALF)
        w_tile = w + inside_n[None, :] * (tl.cdiv(K, 2 * HALF) * HALF) + inner[:, None]
        for k in range(0, K, 2 * HALF):
            both = tl.load(w_tile + k // 2)
            # The last half may lie wholly beyond the end. Its inputs are zero, so any existing group serves.
            low = grid + (k // GROUP if GROUP > 0 else 0)
            high = grid + (tl.minimum((k + HALF) // GROUP, groups - 1) if GROUP > 0 else 0)
            first, second = (both & 15).to(tl.int16), (both >> 4).to(tl.int16)
            total += _product(x_rows, k, K, first, w_scale, w_zero_point, low, 0, GROUP, HALF)
            total += _product(x_rows, k + HALF, K, second, w_scale, w_zero_point, high, 0, GROUP, HALF)
    else:
        inner = tl.arange(0, BLOCK_K)
        w_tile = w + inside_n[None, :] * K + inner[:, None]
        for k in range(0, K, BLOCK_K):
            codes = tl.load(w_tile + k, mask=(inner < K - k)[:, None], other=0).to(tl.int16)
            at = grid + (k // GROUP if GROUP > 0 else 0)
            zero_points = w_zero_point if WHOLE else None
            total += _product(x_rows, k, K, codes, w_scale, zero_points, at, MIDDLE, GROUP, BLOCK_K)
    if GROUP == 0:
        total *= tl.load(w_scale + inside_n)[None, :]
    if bias is not None:
        total += tl.load(bias + inside_n).to(tl.float32)[None, :]
    place = rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :])


@triton.jit
def _product(
    x_rows, k, K, codes, scale, zero_point, grid, held: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr
):
    """The product of BLOCK_K inputs of one group, from ``k`` on, with codes that are already stored minus ``held``."""
    inner = k + tl.arange(0, BLOCK_K)
    values = tl.load(x_rows + inner[None, :], mask=(inner < K)[None, :], other=0.0)
    if zero_point is not None:
        codes -= (tl.load(zero_point + grid).to(tl.int16) - held)[None, :]
    product = dot_codes(values, codes)
    if GROUP > 0:
        product *= tl.load(scale + grid)[None, :]
    return product
