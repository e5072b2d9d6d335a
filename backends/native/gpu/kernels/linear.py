"""The matrix product of codes, with the operations that follow it."""

from __future__ import annotations

import triton
import triton.language as tl

from fxquant.backends.native.gpu.kernels.numeric import MIDDLE, activate, dot_floats, held_codes

SPLIT_BEYOND = tl.constexpr(2048)  # Sums per warp: 64 registers per thread.


@triton.jit
def linear_kernel(
    x,
    w,
    out,
    x_scale,
    x_zero_point,
    w_scale,
    w_zero_point,
    w_sums,
    w_offset,
    x_sums,
    bias,
    gate,
    residual,
    inner,
    up,
    out_scale,
    out_zero_point,
    out_sums,
    M,
    N,
    K,
    x_scale_rows,
    x_zero_point_rows,
    bias_rows,
    bias_stride,
    gate_rows,
    gate_stride,
    out_scale_rows,
    out_zero_point_rows,
    qmax,
    rank,
    ACTIVATION: tl.constexpr,
    HALF: tl.constexpr,
    GROUP: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SUPER_M: tl.constexpr,
    WARPS: tl.constexpr,
    RANK: tl.constexpr,
):
    """Compute one tile `[BLOCK_M, BLOCK_N]` of the result. Operations whose pointer is None are skipped.

    ``x`` is `[M, K]`. ``w`` is `[N, K]`; with HALF > 0 it is `[N, ceil(K / (2 HALF)) HALF]` with two codes per byte,
    which combines the first and the second HALF of each 2 HALF inputs. ``*_rows`` is the number of rows that share an
    entry of a vector. With GROUP > 0 the grid of the weight is `[N, ceil(K / GROUP)]`, and ``w_sums`` are float32 and
    include the scales. The sums of the rows of codes are added to ``out_sums``, which must start at zero. 8-bit floats
    have no zero points and no sums, so these pointers are None for them. A branch of low rank adds ``inner``,
    `[M, rank]`, times ``up``, `[N, rank]`; RANK is the next power of two of at least 16.
    """
    pid = tl.program_id(0)
    # Tiles that run at the same time share rows of x and of w, which stay in the L2 cache.
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    width = SUPER_M * tiles_n
    first_m = (pid // width) * SUPER_M
    size_m = tl.minimum(tiles_m - first_m, SUPER_M)
    tile_m = first_m + (pid % width) % size_m
    tile_n = (pid % width) // size_m

    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Indices outside wrap around to indices inside, and their results are not written: loads along these axes need
    # no mask.
    x_rows = x + (rows % M).to(tl.int64)[:, None] * K
    inside_n = columns % N
    if HALF > 0:
        total = _sum_halves(x_rows, w, w_scale, w_zero_point, inside_n, K, HALF, GROUP, BLOCK_M, BLOCK_N)
    else:
        total = _sum_bytes(x_rows, w, w_scale, inside_n, K, GROUP, FP8, BLOCK_M, BLOCK_N, BLOCK_K)

    # Process half of the columns at a time if the epilogue of all columns would not fit the registers.
    if BLOCK_M * BLOCK_N > SPLIT_BEYOND * WARPS:
        parts = total.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
    else:
        parts = (total,)
    PART_N: tl.constexpr = BLOCK_N // len(parts)
    for part in tl.static_range(len(parts)):
        _finish(
            parts[part],
            rows,
            tile_n * BLOCK_N + part * PART_N + tl.arange(0, PART_N),
            out,
            x_scale,
            x_zero_point,
            w_scale,
            w_sums,
            w_offset,
            x_sums,
            bias,
            gate,
            residual,
            inner,
            up,
            out_scale,
            out_zero_point,
            out_sums,
            M,
            N,
            K,
            x_scale_rows,
            x_zero_point_rows,
            bias_rows,
            bias_stride,
            gate_rows,
            gate_stride,
            out_scale_rows,
            out_zero_point_rows,
            qmax,
            rank,
            ACTIVATION,
            GROUP,
            FP8,
            BLOCK_M,
            RANK,
        )


@triton.jit
def _finish(
    total,
    rows,
    columns,
    out,
    x_scale,
    x_zero_point,
    w_scale,
    w_sums,
    w_offset,
    x_sums,
    bias,
    gate,
    residual,
    inner,
    up,
    out_scale,
    out_zero_point,
    out_sums,
    M,
    N,
    K,
    x_scale_rows,
    x_zero_point_rows,
    bias_rows,
    bias_stride,
    gate_rows,
    gate_stride,
    out_scale_rows,
    out_zero_point_rows,
    qmax,
    rank,
    ACTIVATION: tl.constexpr,
    GROUP: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK_M: tl.constexpr,
    RANK: tl.constexpr,
):
    """Compute the result from the sums and write it, for some columns of a tile."""
    within_m, within_n = rows < M, columns < N
    within = within_m[:, None] & within_n[None, :]
    scale = tl.load(x_scale + rows // x_scale_rows, mask=within_m, other=0.0)
    if not FP8:
        zero_point = tl.load(x_zero_point + rows // x_zero_point_rows, mask=within_m, other=0).to(tl.int32)
        shift = zero_point - MIDDLE
        sums = tl.load(w_sums + columns, mask=within_n, other=0)
        if GROUP > 0:
            total -= shift.to(tl.float32)[:, None] * sums[None, :]
        else:
            total -= shift[:, None] * sums[None, :]
            if x_sums is not None:
                held = tl.load(w_offset + columns, mask=within_n, other=0)
                row_sums = tl.load(x_sums + rows, mask=within_m, other=0) - K * shift
                total -= row_sums[:, None] * held[None, :]
    y = total.to(tl.float32) * scale[:, None]
    if GROUP == 0:
        y *= tl.load(w_scale + columns, mask=within_n, other=0.0)[None, :]
    if inner is not None:
        ranks = tl.arange(0, RANK)
        known = ranks < rank
        held = inner + rows.to(tl.int64)[:, None] * rank + ranks[None, :]
        factor = up + columns.to(tl.int64)[None, :] * rank + ranks[:, None]
        y += dot_floats(
            tl.load(held, mask=within_m[:, None] & known[None, :], other=0.0),
            tl.load(factor, mask=known[:, None] & within_n[None, :], other=0.0),
        )
    if bias is not None:
        at = (rows // bias_rows).to(tl.int64)[:, None] * bias_stride + columns[None, :]
        y += tl.load(bias + at, mask=within, other=0.0).to(tl.float32)
    y = activate(y, ACTIVATION)
    if gate is not None:
        at = (rows // gate_rows).to(tl.int64)[:, None] * gate_stride + columns[None, :]
        y *= tl.load(gate + at, mask=within, other=0.0).to(tl.float32)
    place = rows.to(tl.int64)[:, None] * N + columns[None, :]
    if residual is not None:
        y += tl.load(residual + place, mask=within, other=0.0).to(tl.float32)
    if out_scale is not None:
        step = tl.load(out_scale + rows // out_scale_rows, mask=within_m, other=1.0)
        if FP8:
            middle = tl.zeros((BLOCK_M, 1), dtype=tl.int32)
        else:
            middle = tl.load(out_zero_point + rows // out_zero_point_rows, mask=within_m, other=0).to(tl.int32)[:, None]
        codes = held_codes(y, (1.0 / step)[:, None], middle, qmax, FP8)
        tl.store(out + place, codes, mask=within)
        if out_sums is not None:
            # The sums are integers, so the order in which tiles add to a row does not change them.
            part = tl.sum(tl.where(within_n[None, :], codes, 0).to(tl.int32), 1)
            tl.atomic_add(out_sums + rows, part, mask=within_m, sem="relaxed")
    else:
        tl.store(out + place, y.to(out.dtype.element_ty), mask=within)


@triton.jit
def _sum_bytes(
    x_rows,
    w,
    w_scale,
    columns,
    K,
    GROUP: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sums over weights stored one per byte: int32, or float32 for 8-bit floats and for groups."""
    inner = tl.arange(0, BLOCK_K)
    x_tile = x_rows + inner[None, :]
    w_tile = w + columns.to(tl.int64)[None, :] * K + inner[:, None]
    if FP8 or GROUP > 0:
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for k in range(0, K, BLOCK_K):
        left = inner < K - k
        if FP8:
            codes = tl.load(x_tile, mask=left[None, :], other=0.0)
            weight = tl.load(w_tile, mask=left[:, None], other=0.0)
            total = tl.dot(codes, weight, total)
        else:
            codes = tl.load(x_tile, mask=left[None, :], other=0)
            weight = tl.load(w_tile, mask=left[:, None], other=0)
            if GROUP > 0:
                scale = tl.load(w_scale + columns * tl.cdiv(K, GROUP) + k // GROUP)
                total += tl.dot(codes, weight, out_dtype=tl.int32).to(tl.float32) * scale[None, :]
            else:
                total = tl.dot(codes, weight, total, out_dtype=tl.int32)
        x_tile += BLOCK_K
        w_tile += BLOCK_K
    return total


@triton.jit
def _sum_halves(
    x_rows,
    w,
    w_scale,
    w_zero_point,
    columns,
    K,
    HALF: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """As :func:`_sum_bytes` for weights stored two per byte, which are unpacked in registers."""
    inner = tl.arange(0, HALF)
    x_tile = x_rows + inner[None, :]
    w_tile = w + columns.to(tl.int64)[None, :] * (tl.cdiv(K, 2 * HALF) * HALF) + inner[:, None]
    if GROUP > 0:
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        grid = columns * tl.cdiv(K, GROUP)
        last = tl.cdiv(K, GROUP) - 1
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
        zero_point = tl.load(w_zero_point + columns).to(tl.int8)
    for k in range(0, K, 2 * HALF):
        low = tl.load(x_tile, mask=(inner < K - k)[None, :], other=0)
        high = tl.load(x_tile + HALF, mask=(inner < K - k - HALF)[None, :], other=0)
        both = tl.load(w_tile)
        first, second = (both & 15).to(tl.int8), (both >> 4).to(tl.int8)
        if GROUP > 0:
            # The last half may lie wholly beyond the end. Its inputs are zero, so any existing group serves.
            one, two = k // GROUP, tl.minimum((k + HALF) // GROUP, last)
            first -= tl.load(w_zero_point + grid + one).to(tl.int8)[None, :]
            second -= tl.load(w_zero_point + grid + two).to(tl.int8)[None, :]
            scale = tl.load(w_scale + grid + one)
            total += tl.dot(low, first, out_dtype=tl.int32).to(tl.float32) * scale[None, :]
            scale = tl.load(w_scale + grid + two)
            total += tl.dot(high, second, out_dtype=tl.int32).to(tl.float32) * scale[None, :]
        else:
            total = tl.dot(low, first - zero_point[None, :], total, out_dtype=tl.int32)
            total = tl.dot(high, second - zero_point[None, :], total, out_dtype=tl.int32)
        x_tile += 2 * HALF
        w_tile += HALF
    return total
