"""Kernels that rotate channels by Hadamard matrices."""

from __future__ import annotations

import triton
import triton.language as tl

from fxquant.backends.native.gpu.kernels.numeric import codes_of_rows


@triton.jit
def walsh_hadamard(y, STEPS: tl.constexpr):
    """The Walsh-Hadamard transform of every 2**STEPS neighbours along the last axis of float32 values, not scaled.

    Values stay in the registers of their threads; those of other threads come by the instructions of reductions.
    """
    for step in tl.static_range(STEPS):
        pairs = tl.reshape(y, (y.numel // (2 << step), 2, 1 << step))
        bits = pairs.to(tl.int32, bitcast=True)
        # The other value of a pair: the sum of both as integers, minus its own. A sum of floats would round.
        both = tl.sum(bits, 1, keep_dims=True).to(tl.int64)
        other = (both - bits.to(tl.int64)).to(tl.int32).to(tl.float32, bitcast=True)
        second = (tl.arange(0, 2) == 1)[None, :, None]
        y = tl.reshape(tl.where(second, other - pairs, other + pairs), y.shape)
    return y


@triton.jit
def hadamard_kernel(
    x,
    signs,
    out,
    scale,
    zero_point,
    blocks,
    blocks_per_row,
    scale_rows,
    zero_point_rows,
    qmax,
    FACTOR: tl.constexpr,
    STEPS: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """TILE blocks of BLOCK = 2**STEPS channels, rotated; their codes, if there is a scale.

    FACTOR is one over the root of BLOCK. Codes are those of the values as they would be stored.
    """
    index = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = index < blocks
    within = tl.broadcast_to(inside[:, None], (TILE, BLOCK))
    channels = (index % blocks_per_row)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    place = index[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    values = tl.load(x + place, mask=within, other=0.0).to(tl.float32)
    values *= tl.load(signs + channels, mask=within, other=0).to(tl.float32) * FACTOR
    values = walsh_hadamard(values, STEPS)
    if scale is None:
        tl.store(out + place, values, mask=within)
    else:
        values = values.to(x.dtype.element_ty).to(tl.float32)
        row = index // blocks_per_row
        codes = codes_of_rows(values, row, inside, scale, zero_point, scale_rows, zero_point_rows, qmax, FP8)
        tl.store(out + place, codes, mask=within)
