"""Kernels that read rows of activations and write their codes or the sums of codes."""

from __future__ import annotations

import triton
import triton.language as tl

from fxquant.backends.native.gpu.kernels.hadamard import walsh_hadamard
from fxquant.backends.native.gpu.kernels.numeric import codes_of_rows, exact_codes, held_codes, token_grid, token_step


@triton.jit
def quantize_rows_kernel(
    x,
    out,
    weight,
    bias,
    factor,
    shift,
    scale,
    zero_point,
    sums,
    signs,
    C,
    factor_rows,
    factor_stride,
    shift_rows,
    shift_stride,
    scale_rows,
    zero_point_rows,
    qmax,
    eps,
    plus,
    NORM: tl.constexpr,
    TOKENS: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK: tl.constexpr,
    FACTOR: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Codes of one row of C channels after a norm, its modulation and a rotation, whose pointers may be None.

    The rotation multiplies blocks of 2**STEPS channels, with their signs, by FACTOR times a Hadamard matrix.

    8-bit floats have no zero point: it is not read, and with TOKENS zeros are written.

    NORM is ``layer``, ``rms`` or ``none``. With TOKENS, the grid of a row is computed from its values and written to
    ``scale`` and ``zero_point``; otherwise it is read from there. ``sums`` receives the sum of the codes as stored.
    """
    row = tl.program_id(0)
    channels = tl.arange(0, BLOCK)
    within = channels < C
    start = row.to(tl.int64) * C
    y = tl.load(x + start + channels, mask=within, other=0.0).to(tl.float32)
    if NORM == "layer":
        # Subtracting the mean first loses no precision where the mean is large.
        y = tl.where(within, y - tl.sum(y, 0) / C, 0.0)
    if NORM != "none":
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
    if signs is not None:
        y = walsh_hadamard(y * (tl.load(signs + channels, mask=within, other=0).to(tl.float32) * FACTOR), STEPS)
        if NORM == "none":  # As if the rotated values were stored before.
            y = y.to(x.dtype.element_ty).to(tl.float32)
    if TOKENS:
        if FP8:
            step, middle = token_step(tl.min(y, 0), tl.max(y, 0)), 0
            tl.store(zero_point + row, 0)
        else:
            step, middle = token_grid(tl.min(y, 0), tl.max(y, 0), qmax)
            tl.store(zero_point + row, middle.to(tl.uint8))
        tl.store(scale + row, step)
    else:
        step = tl.load(scale + row // scale_rows)
        middle = 0 if FP8 else tl.load(zero_point + row // zero_point_rows).to(tl.int32)
    if NORM == "none":
        codes = exact_codes(y, step + tl.zeros((BLOCK,), dtype=tl.float32), middle, qmax, FP8)
    else:
        codes = held_codes(y, 1.0 / step, middle, qmax, FP8)
    tl.store(out + start + channels, codes, mask=within)
    if sums is not None:
        # Products of 8-bit floats need no sums, but the output must be filled.
        total = 0 if FP8 else tl.sum(tl.where(within, codes.to(tl.int32), 0), 0)
        tl.store(sums + row, total)


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
    """Codes of a tile of `[M, N]` values; ``*_rows`` is the number of rows that share an entry of the grid."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < M
    within = inside[:, None] & (columns < N)[None, :]
    place = rows.to(tl.int64)[:, None] * N + columns[None, :]
    values = tl.load(x + place, mask=within, other=0.0).to(tl.float32)
    codes = codes_of_rows(values, rows, inside, scale, zero_point, scale_rows, zero_point_rows, qmax, FP8)
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
