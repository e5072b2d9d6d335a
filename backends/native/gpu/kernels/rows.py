"""Kernels that read rows of activations and write their codes, or their sums."""

from __future__ import annotations

import triton
import triton.language as tl

from fxquant.backends.native.gpu.kernels.numeric import MIDDLE, held_codes, round_even, step_of, to_fp8


@triton.jit
def norm_quantize_kernel(
    x,
    out,
    weight,
    bias,
    factor,
    shift,
    out_scale,
    out_zero_point,
    C,
    factor_rows,
    factor_stride,
    shift_rows,
    shift_stride,
    out_scale_rows,
    out_zero_point_rows,
    qmax,
    eps,
    plus,
    CENTERED: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Norm, modulation and quantization of one row of C channels; pointers that are None are left out."""
    row = tl.program_id(0)
    channels = tl.arange(0, BLOCK)
    within = channels < C
    start = row.to(tl.int64) * C
    y = tl.load(x + start + channels, mask=within, other=0.0).to(tl.float32)
    if CENTERED:
        # Differences from the mean lose nothing where the mean is large.
        y = tl.where(within, y - tl.sum(y, 0) / C, 0.0)
    y *= 1.0 / tl.sqrt(tl.sum(y * y, 0) / C + eps)
    if weight is not None:
        y *= tl.load(weight + channels, mask=within, other=0.0).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + channels, mask=within, other=0.0).to(tl.float32)
    if factor is not None:
        at = (row // factor_rows).to(tl.int64) * factor_stride
        y *= tl.load(factor + at + channels, mask=within, other=0.0).to(tl.float32) + plus
    if shift is not None:
        at = (row // shift_rows).to(tl.int64) * shift_stride
        y += tl.load(shift + at + channels, mask=within, other=0.0).to(tl.float32)
    zero_point = tl.load(out_zero_point + row // out_zero_point_rows).to(tl.int32)
    step = step_of(tl.load(out_scale + row // out_scale_rows), zero_point, qmax, FP8)
    tl.store(out + start + channels, held_codes(y, 1.0 / step, zero_point, qmax, FP8), mask=within)


@triton.jit
def quantize_kernel(
    x,
    out,
    scale,
    zero_point,
    M,
    N,
    scale_rows,
    zero_point_rows,
    qmax,
    FP8: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Codes of a tile of `[M, N]` values; ``*_rows`` are the rows that share an entry of the grid."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < M
    within = inside[:, None] & (columns < N)[None, :]
    place = rows.to(tl.int64)[:, None] * N + columns[None, :]
    values = tl.load(x + place, mask=within, other=0.0).to(tl.float32)
    middle = tl.load(zero_point + rows // zero_point_rows, mask=inside, other=0).to(tl.int32)
    step = step_of(tl.load(scale + rows // scale_rows, mask=inside, other=1.0), middle, qmax, FP8)
    # As the reference divides; a product with the inverse may round otherwise.
    steps = tl.math.div_rn(values, tl.broadcast_to(step[:, None], (BLOCK_M, BLOCK_N)))
    if FP8:
        codes = to_fp8(steps)
    else:
        near = round_even(steps).to(tl.int32) + middle[:, None]
        codes = (tl.minimum(tl.maximum(near, 0), qmax) - MIDDLE).to(tl.int8)
    tl.store(out + place, codes, mask=within)


@triton.jit
def row_sums_kernel(x, out, K, BLOCK: tl.constexpr):
    """The sum of one row of K codes."""
    row = tl.program_id(0)
    inner = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    for k in range(0, K, BLOCK):
        total += tl.load(x + row.to(tl.int64) * K + k + inner, mask=inner < K - k, other=0).to(tl.int32)
    tl.store(out + row, tl.sum(total, 0))
