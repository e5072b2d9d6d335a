"""Attention of codes: both products on tensor cores with exact sums, and the softmax between them in float32.

The code of a probability depends on the sum over all keys. So the kernel reads the keys twice: once for the largest
score and the sum of exponentials, once for the codes and their product with the values. If all keys fit one tile, one
pass is enough.

Scores are exact integers. With up to 129 channels they fit 23 bits after the least score that the zero points allow is
subtracted. Adding such an integer to the bits of 2**23 gives the bits of the float32 2**23 + integer, so no score needs
a conversion. The product with the values is in float16, which represents codes, and values minus their zero point,
exactly. Float16 results of the softmax already have the layout of a factor of the next product, which bytes do not,
and values need no transposition. The sums of this product are exact up to 2**24.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fxquant.backends.native.gpu.kernels.numeric import MIDDLE, held_codes

_ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it to a float32 rounds away all fractional bits.
_LOG2_E = tl.constexpr(1.4426950408889634)
_TWO_23 = tl.constexpr(0x4B000000)  # The bits of 2.0**23 in float32.
_HALF_1152 = tl.constexpr(0x6480)  # The bits of 1152.0 in float16, in units of one.


@triton.jit
def key_offsets_kernel(
    k,
    offsets,
    q_zero_point,
    q_zero_point_each,
    keys,
    heads,
    k_batch,
    k_head,
    k_token,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The term that the zero point of the queries adds to the scores of each key, int32 ``[batch, heads, keys]``."""
    tiles = tl.cdiv(keys, BLOCK)
    each = (tl.program_id(0) // tiles).to(tl.int64)
    tokens = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    channels = tl.arange(0, WIDTH)
    base = k + ((each // heads) * k_batch + (each % heads) * k_head) * ALIGN
    within = tokens < keys
    at = base + (tokens.to(tl.int64) * k_token * ALIGN)[:, None] + channels[None, :]
    codes = tl.load(at, mask=within[:, None] & (channels < DEPTH)[None, :], other=0)
    zero_q = tl.load(q_zero_point + (each // heads) * q_zero_point_each).to(tl.int32) - MIDDLE
    tl.store(offsets + each * keys + tokens, -zero_q * tl.sum(codes.to(tl.int32), 1), mask=within)


@triton.jit
def attention_kernel(
    q,
    k,
    v,
    mask,
    out,
    k_offsets,
    q_scale,
    q_zero_point,
    k_scale,
    k_zero_point,
    v_scale,
    v_zero_point,
    softmax_scale,
    softmax_zero_point,
    out_scale,
    out_zero_point,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    mask_batch,
    mask_head,
    mask_query,
    mask_key,
    q_scale_each,
    q_zero_point_each,
    k_scale_each,
    k_zero_point_each,
    v_scale_each,
    v_zero_point_each,
    out_scale_each,
    out_zero_point_each,
    heads,
    shared,
    queries,
    keys,
    softmax_qmax,
    qmax,
    DEPTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    DEPTH_0: tl.constexpr,
    DEPTH_1: tl.constexpr,
    CHANNELS_0: tl.constexpr,
    CHANNELS_1: tl.constexpr,
    MASK: tl.constexpr,
    SHIFTED: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute BLOCK_M queries of one head; ``out`` is contiguous ``[batch, queries, heads, CHANNELS]``.

    Strides of ``q``, ``k`` and ``v`` are in units of ALIGN, which determines how wide loads may be. ``*_each`` is 1 for
    a grid per sample, 0 for one grid for all. ``shared`` is the number of query heads that share one head of keys and
    values. Tile widths are powers of two, so a head is split into ``DEPTH_0 + DEPTH_1`` channels for the scores and
    ``CHANNELS_0 + CHANNELS_1`` for the result; the second width may be 0. MASK is ``none``, ``bool`` or ``float``. With
    WHOLE, all keys fit one tile. With EVEN, the keys fill their tiles. With SHIFTED, scores fit 23 bits.
    """
    tiles = tl.cdiv(queries, BLOCK_M)
    each = tl.program_id(0) // tiles
    sample, head = (each // heads).to(tl.int64), (each % heads).to(tl.int64)
    rows = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    within = rows < queries
    zero_q = tl.load(q_zero_point + sample * q_zero_point_each).to(tl.int32) - MIDDLE
    zero_k = tl.load(k_zero_point + sample * k_zero_point_each).to(tl.int32) - MIDDLE
    zero_v = tl.load(v_zero_point + sample * v_zero_point_each).to(tl.int32) - MIDDLE
    scale = tl.load(q_scale + sample * q_scale_each) * tl.load(k_scale + sample * k_scale_each) * _LOG2_E
    step = tl.load(softmax_scale)
    highest = (softmax_qmax - tl.load(softmax_zero_point).to(tl.int32)).to(tl.float32)

    q += (sample * q_batch + head * q_head) * ALIGN
    q_rows = q + (rows.to(tl.int64) * q_token * ALIGN)[:, None]
    part_0 = tl.arange(0, DEPTH_0)
    q_0 = tl.load(q_rows + part_0[None, :], mask=within[:, None] & (part_0 < DEPTH)[None, :], other=0)
    row_sums = tl.sum(q_0.to(tl.int32), 1)
    q_1 = q_0
    if DEPTH_1 > 0:
        part_1 = DEPTH_0 + tl.arange(0, DEPTH_1)
        q_1 = tl.load(q_rows + part_1[None, :], mask=within[:, None] & (part_1 < DEPTH)[None, :], other=0)
        row_sums += tl.sum(q_1.to(tl.int32), 1)
    # sum (q - zero_q) (k - zero_k) in three parts: the sum of q k on tensor cores, this term with the sums of q, and
    # k_offsets with the sums of k.
    q_offsets = DEPTH * zero_q * zero_k - zero_k * row_sums
    centre = 0.0
    if SHIFTED:
        # The largest magnitude of a negative score, for codes of 0 to 255.
        a, b = zero_q + MIDDLE, zero_k + MIDDLE
        least = DEPTH * tl.maximum(a * (255 - b), b * (255 - a))
        q_offsets += least + _TWO_23
        centre = (least + _TWO_23).to(tl.float32, bitcast=True)

    shared_head = head // shared
    k += (sample * k_batch + shared_head * k_head) * ALIGN
    v += (sample * v_batch + shared_head * v_head) * ALIGN
    k_offsets += (sample * (heads // shared) + shared_head) * keys
    if MASK != "none":
        mask += sample * mask_batch + head * mask_head
    # With a float mask, scores are in units of log2 before the maximum is subtracted; otherwise they are integers.
    factor = 1.0 if MASK == "float" else scale

    result_0 = tl.zeros((BLOCK_M, CHANNELS_0), dtype=tl.float32)
    result_1 = result_0
    if CHANNELS_1 > 0:
        result_1 = tl.zeros((BLOCK_M, CHANNELS_1), dtype=tl.float32)
    if WHOLE:
        scores = _scores(q_0, q_1, k, k_offsets, mask, rows, queries, q_offsets, centre, scale, 0, keys,
                         k_token, mask_query, mask_key, DEPTH, DEPTH_0, DEPTH_1, MASK, SHIFTED, EVEN, ALIGN,
                         BLOCK_N)  # fmt: skip
        top = _finite(tl.max(scores, 1))
        powers = tl.exp2((scores - top[:, None]) * factor)
        total = tl.sum(powers, 1)
        inverse = tl.where(total > 0.0, 1.0 / (_positive(total) * step), 0.0)
        codes = _codes(powers * inverse[:, None], highest)
        result_0 = _attend(result_0, codes, v, 0, keys, v_token, zero_v, 0,
                           CHANNELS, CHANNELS_0, EVEN, ALIGN, BLOCK_N)  # fmt: skip
        if CHANNELS_1 > 0:
            result_1 = _attend(result_1, codes, v, 0, keys, v_token, zero_v, CHANNELS_0,
                               CHANNELS, CHANNELS_1, EVEN, ALIGN, BLOCK_N)  # fmt: skip
    else:
        highest_score = tl.full((BLOCK_M,), -float("inf"), dtype=tl.float32)
        total = tl.zeros((BLOCK_M,), dtype=tl.float32)
        for start in range(0, keys, BLOCK_N):
            scores = _scores(q_0, q_1, k, k_offsets, mask, rows, queries, q_offsets, centre, scale, start, keys,
                             k_token, mask_query, mask_key, DEPTH, DEPTH_0, DEPTH_1, MASK, SHIFTED, EVEN, ALIGN,
                             BLOCK_N)  # fmt: skip
            higher = tl.maximum(highest_score, tl.max(scores, 1))
            top = _finite(higher)
            total *= tl.exp2((highest_score - top) * factor)
            total += tl.sum(tl.exp2((scores - top[:, None]) * factor), 1)
            highest_score = higher
        top = _finite(highest_score)
        # The division by the sum and by the step is done in the exponent, where it is free.
        raised = tl.where(total > 0.0, -tl.log2(_positive(total) * step), -float("inf"))
        for start in range(0, keys, BLOCK_N):
            scores = _scores(q_0, q_1, k, k_offsets, mask, rows, queries, q_offsets, centre, scale, start, keys,
                             k_token, mask_query, mask_key, DEPTH, DEPTH_0, DEPTH_1, MASK, SHIFTED, EVEN, ALIGN,
                             BLOCK_N)  # fmt: skip
            codes = _codes(tl.exp2((scores - top[:, None]) * factor + raised[:, None]), highest)
            result_0 = _attend(result_0, codes, v, start, keys, v_token, zero_v, 0,
                               CHANNELS, CHANNELS_0, EVEN, ALIGN, BLOCK_N)  # fmt: skip
            if CHANNELS_1 > 0:
                result_1 = _attend(result_1, codes, v, start, keys, v_token, zero_v, CHANNELS_0,
                                   CHANNELS, CHANNELS_1, EVEN, ALIGN, BLOCK_N)  # fmt: skip

    unit = step * tl.load(v_scale + sample * v_scale_each)
    out_rows = out + (((sample * queries + rows) * heads + head) * CHANNELS)[:, None]
    if out_scale is not None:
        out_scale += sample * out_scale_each
        out_zero_point += sample * out_zero_point_each
    _write(result_0 * unit, out_rows, within, out_scale, out_zero_point, qmax, 0, CHANNELS, CHANNELS_0)
    if CHANNELS_1 > 0:
        _write(result_1 * unit, out_rows, within, out_scale, out_zero_point, qmax, CHANNELS_0, CHANNELS, CHANNELS_1)


@triton.jit
def _scores(
    q_0,
    q_1,
    k,
    k_offsets,
    mask,
    rows,
    queries,
    q_offsets,
    centre,
    scale,
    start,
    keys,
    k_token,
    mask_query,
    mask_key,
    DEPTH: tl.constexpr,
    DEPTH_0: tl.constexpr,
    DEPTH_1: tl.constexpr,
    MASK: tl.constexpr,
    SHIFTED: tl.constexpr,
    EVEN: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Scores of a tile of keys; -inf for keys that a query does not see.

    Scores are integers plus `centre`. With a float mask they are real scores in units of log2, plus the mask.
    """
    columns = start + tl.arange(0, BLOCK_N)
    seen = columns < keys
    k_columns = k + (columns.to(tl.int64) * k_token * ALIGN)[None, :]
    k_0 = _tile(k_columns, tl.arange(0, DEPTH_0)[:, None], seen[None, :], DEPTH, DEPTH_0, EVEN)
    products = tl.dot(q_0, k_0, out_dtype=tl.int32)
    if DEPTH_1 > 0:
        k_1 = _tile(k_columns, DEPTH_0 + tl.arange(0, DEPTH_1)[:, None], seen[None, :], DEPTH, DEPTH_0 + DEPTH_1, EVEN)
        products = tl.dot(q_1, k_1, products, out_dtype=tl.int32)
    offsets = tl.load(k_offsets + columns) if EVEN else tl.load(k_offsets + columns, mask=seen, other=0)
    exact = products + offsets[None, :] + q_offsets[:, None]
    scores = exact.to(tl.float32, bitcast=SHIFTED)
    if MASK != "none":
        at = mask + (rows[:, None] * mask_query + columns[None, :] * mask_key)
        both = (rows < queries)[:, None] & seen[None, :]
        if MASK == "float":
            added = tl.load(at, mask=both, other=0.0).to(tl.float32)
            scores = (scores - centre) * scale + added * _LOG2_E
        else:
            scores = tl.where(tl.load(at, mask=both, other=0) != 0, scores, -float("inf"))
    if not EVEN:
        scores = tl.where(seen[None, :], scores, -float("inf"))
    return scores


@triton.jit
def _finite(top):
    """The value to subtract from scores: their maximum, or zero for a query that sees no key."""
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def _positive(total):
    """The sum of exponentials, or one for a query that sees no key."""
    return tl.where(total > 0.0, total, 1.0)


@triton.jit
def _codes(steps, highest):
    """The nearest code of each probability, halves to even, as float16. No input is below zero."""
    return ((tl.minimum(steps, highest) + _ROUNDER) - _ROUNDER).to(tl.float16)


@triton.jit
def _attend(
    result,
    codes,
    v,
    start,
    keys,
    v_token,
    zero_v,
    FIRST: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`result` plus codes times WIDTH channels of the values of a tile of keys."""
    columns = start + tl.arange(0, BLOCK_N)
    rows = v + (columns.to(tl.int64) * v_token * ALIGN)[:, None]
    values = _tile(rows, FIRST + tl.arange(0, WIDTH)[None, :], (columns < keys)[:, None], CHANNELS, FIRST + WIDTH, EVEN)
    # Codes are converted through their bits, as scores are. Codes and zero points plus 1152 are exact in float16.
    more = (values.to(tl.int16) + _HALF_1152).to(tl.float16, bitcast=True)
    return tl.dot(codes, more - (zero_v + 1152).to(tl.float16), result)


@triton.jit
def _tile(tokens, channels, seen, WIDTH: tl.constexpr, END: tl.constexpr, EVEN: tl.constexpr):
    """Load the codes of tokens; zero beyond the last channel and the last token."""
    if EVEN:
        if END <= WIDTH:
            codes = tl.load(tokens + channels)
        else:
            codes = tl.load(tokens + channels, mask=channels < WIDTH, other=0)
    else:
        codes = tl.load(tokens + channels, mask=seen & (channels < WIDTH), other=0)
    return codes


@triton.jit
def _write(
    y,
    out_rows,
    within,
    out_scale,
    out_zero_point,
    qmax,
    FIRST: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Write WIDTH channels of the result: values, or codes stored minus 128."""
    channels = FIRST + tl.arange(0, WIDTH)
    inside = within[:, None] & (channels < CHANNELS)[None, :]
    if out_scale is not None:
        zero_point = tl.load(out_zero_point).to(tl.int32)
        held = held_codes(y, 1.0 / tl.load(out_scale), zero_point, qmax, False)
        tl.store(out_rows + channels[None, :], held, mask=inside)
    else:
        tl.store(out_rows + channels[None, :], y.to(out_rows.dtype.element_ty), mask=inside)
