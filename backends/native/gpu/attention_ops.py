"""The operator for attention of codes: its schema, the function that calls its kernel, and the tiling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxquant.backends.native.gpu import machine
from fxquant.backends.native.library import FLOATS, define_kernel
from fxquant.errors import BackendError

MOST_CHANNELS = 256
"""The most channels of a head that the kernel accepts."""

_WIDE = 128  # With more channels per head, the result takes most of the registers.
_MOST_SHIFTED = 129  # The most channels whose scores fit 23 bits: 255 * 255 * 129 < 2**23.
_SUMMED = 128  # Keys per program of the kernel that sums their codes.


@dataclass(frozen=True)
class Cut:
    """The tiling of an attention.

    Attributes:
        block_m: Queries per program.
        block_n: Keys per step. If one step covers all keys, scores are computed once instead of twice.
        warps: Warps per program.
        stages: Steps whose loads are in flight.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int


def choose(queries: int, keys: int, channels: int, masked: bool) -> Cut:
    """The tiling of an attention that keeps all its tiles in the registers of a Hopper GPU.

    Args:
        queries: Queries of one head.
        keys: Keys of one head.
        channels: Channels of one head, of the keys or of the values, whichever are more.
        masked: Whether there is a mask. Its tile takes registers too.
    """
    wide = channels > _WIDE
    step, stages = 32 if wide else 64, 2 if masked else 3
    if queries <= 16:
        return Cut(16, min(step, _power(keys, 16)), 4, stages)
    if keys <= (step if wide else 128 if masked else 256):
        return Cut(64, _power(keys, 16), 4, 2)
    if queries <= 64:
        return Cut(64, step, 4, stages)
    return Cut(128, step if wide or masked else 128, 8, stages)


def parts(channels: int, least: int) -> tuple[int, int]:
    """Widths, powers of two, of the one or two tiles that hold the channels with the least padding."""
    one = _power(channels, least)
    first = one // 2
    second = _power(channels - first, least)
    return (one, 0) if first < least or second >= first else (first, second)


def int8_attention(
    q: Tensor,
    q_scale: Tensor,
    q_zero_point: Tensor,
    k: Tensor,
    k_scale: Tensor,
    k_zero_point: Tensor,
    v: Tensor,
    v_scale: Tensor,
    v_zero_point: Tensor,
    mask: Tensor | None,
    softmax_scale: Tensor,
    softmax_zero_point: Tensor,
    softmax_qmax: int,
    out_scale: Tensor | None,
    out_zero_point: Tensor | None,
    qmax: int,
    out_dtype: torch.dtype,
    cut: Cut | None = None,
) -> Tensor:
    """The op ``triton_attention``: ``softmax(q k + mask) v`` with the probabilities rounded to codes.

    The op never waits for the device.

    Args:
        q: Codes stored minus 128, int8 `[batch, heads, queries, channels]`. The stride of the last axis must be 1;
            others are free.
        q_scale: float32, one for all or one per sample, `[batch, 1, 1, 1]`. It includes the scale of the softmax.
        q_zero_point: The same in uint8, for codes that start at 0.
        k: Codes as `q`, `[batch, k_heads, keys, channels]`; heads / k_heads query heads share one head of keys.
        k_scale: As `q_scale`.
        k_zero_point: As `q_zero_point`.
        v: Codes as `q`, `[batch, k_heads, keys, v_channels]`.
        v_scale: As `q_scale`.
        v_zero_point: As `q_zero_point`.
        mask: Broadcasts to `[batch, heads, queries, keys]`. A bool mask is true for keys that a query sees; a float
            mask is added to the scores. Queries that see no key give zero.
        softmax_scale: Scale of the codes of probabilities, one for all.
        softmax_zero_point: Zero point of the codes of probabilities, one for all.
        softmax_qmax: The highest code of probabilities, at most 255.
        out_scale: Scale of the codes to return, one for all or one per sample; None to return values.
        out_zero_point: Zero point of the codes to return, as `out_scale`.
        qmax: The highest code to return.
        out_dtype: Dtype of the result if it is values.
        cut: The tiling; that of :func:`choose` by default.

    Returns:
        `[batch, queries, heads, v_channels]`: values of `out_dtype`, or int8 codes stored minus 128.

    Raises:
        BackendError: If arguments do not fit.
    """
    grids = {
        "queries": (q_scale, q_zero_point),
        "keys": (k_scale, k_zero_point),
        "values": (v_scale, v_zero_point),
        "probabilities": (softmax_scale, softmax_zero_point),
    }
    if (out_scale is None) != (out_zero_point is None):
        raise BackendError(
            "triton_attention returns codes if it has both out_scale and out_zero_point; only one is given"
        )
    if out_scale is not None and out_zero_point is not None:
        grids["result"] = (out_scale, out_zero_point)
    machine.check_tensors("triton_attention", q, k, v, mask, *(part for grid in grids.values() for part in grid))
    _check_codes(q, k, v, softmax_qmax, out_dtype)
    batch, heads, queries, depth = q.shape
    shared_heads, keys, channels = k.shape[1], k.shape[2], v.shape[3]
    steps = [step for name, grid in grids.items() for step in _check_grid(name, *grid, batch)]
    mask_kind, mask, mask_steps = _expanded(mask, (batch, heads, queries, keys))
    out = q.new_empty((batch, queries, heads, channels), dtype=out_dtype if out_scale is None else torch.int8)
    if not out.numel():
        return out
    from fxquant.backends.native.gpu.kernels import attention as kernels

    cut = choose(queries, keys, max(depth, channels), mask is not None) if cut is None else cut
    align = math.gcd(16, *(step for x in (q, k, v) for step in x.stride()[:3]))
    q_steps, k_steps, v_steps = ([step // align for step in x.stride()[:3]] for x in (q, k, v))
    k_offsets = k.new_empty((batch, shared_heads, keys), dtype=torch.int32)
    with torch.cuda.device_of(q):
        kernels.key_offsets_kernel[(batch * shared_heads * -(-keys // _SUMMED),)](
            k,
            k_offsets,
            q_zero_point,
            steps[1],
            keys,
            shared_heads,
            *k_steps,
            DEPTH=depth,
            WIDTH=_power(depth, 16),
            ALIGN=align,
            BLOCK=_SUMMED,
        )
        kernels.attention_kernel[(batch * heads * -(-queries // cut.block_m),)](
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
            *q_steps,
            *k_steps,
            *v_steps,
            *mask_steps,
            *steps[:6],
            *(steps[8:] or (0, 0)),
            heads,
            heads // shared_heads,
            queries,
            keys,
            softmax_qmax,
            qmax,
            **constants(depth, channels, keys, mask_kind, align, cut),
            num_warps=cut.warps,
            num_stages=cut.stages,
        )
    return out


def constants(depth: int, channels: int, keys: int, mask: str, align: int, cut: Cut) -> dict[str, Any]:
    """The compile-time constants of the kernel.

    Args:
        depth: Channels of queries and keys.
        channels: Channels of values.
        keys: Keys of one head.
        mask: ``none``, ``bool`` or ``float``.
        align: A divisor of the strides of queries, keys and values.
        cut: The tiling.
    """
    depths, widths = parts(depth, 32), parts(channels, 16)
    return {
        "DEPTH": depth,
        "CHANNELS": channels,
        "DEPTH_0": depths[0],
        "DEPTH_1": depths[1],
        "CHANNELS_0": widths[0],
        "CHANNELS_1": widths[1],
        "MASK": mask,
        "SHIFTED": depth <= _MOST_SHIFTED,
        "WHOLE": keys <= cut.block_n,
        "EVEN": keys % cut.block_n == 0,
        "ALIGN": align,
        "BLOCK_M": cut.block_m,
        "BLOCK_N": cut.block_n,
    }


def _power(number: int, least: int) -> int:
    """The next power of two, at least `least`."""
    return max(least, 1 << max(0, number - 1).bit_length())


def _check_codes(q: Tensor, k: Tensor, v: Tensor, softmax_qmax: int, out_dtype: torch.dtype) -> None:
    shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
    if any(x.dtype != torch.int8 for x in (q, k, v)):
        raise BackendError(f"triton_attention reads int8 codes, stored minus 128, not {q.dtype}, {k.dtype}, {v.dtype}")
    if any(x.dim() != 4 for x in (q, k, v)) or k.shape[:3] != v.shape[:3] or k.shape[0] != q.shape[0]:
        raise BackendError(
            f"queries, keys and values {shapes} must be [batch, heads, tokens, channels] with one batch size; keys "
            "and values must have the same number of heads and tokens"
        )
    if q.shape[3] != k.shape[3]:
        raise BackendError(f"queries and keys {shapes} differ in their channels")
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise BackendError(f"the heads of keys do not divide those of queries: {shapes}")
    if not k.shape[2]:
        raise BackendError("triton_attention needs at least one key, and there are no keys")
    if not all(0 < x.shape[3] <= MOST_CHANNELS for x in (q, v)):
        raise BackendError(
            f"triton_attention reads heads of 1 to {MOST_CHANNELS} channels, not {shapes}; leave attention out of the "
            "quantization of this model"
        )
    if any(x.shape[3] > 1 and x.stride(3) != 1 for x in (q, k, v)):
        raise BackendError("triton_attention reads heads whose last axis has stride 1; call contiguous() on them")
    if not 0 <= softmax_qmax <= 255:
        raise BackendError(f"softmax_qmax={softmax_qmax}: codes of probabilities have at most 8 bits, 0 to 255")
    if out_dtype not in FLOATS:
        raise BackendError(f"triton_attention writes float32, bfloat16 and float16, not {out_dtype}")


def _check_grid(name: str, scale: Tensor, zero_point: Tensor, batch: int) -> list[int]:
    """Strides along the samples, 1 or 0, of a scale and a zero point."""
    for values, dtype in ((scale, torch.float32), (zero_point, torch.uint8)):
        if values.dtype != dtype:
            raise BackendError(
                f"the grid of the {name} must be of float32 and uint8, not {scale.dtype}, {zero_point.dtype}"
            )
        one_a_sample = name != "probabilities" and values.shape[:1] == (batch,) and values.numel() == batch
        if values.numel() != 1 and not one_a_sample:
            fits = "one for all" if name == "probabilities" else f"one for all or one for each of {batch} samples"
            raise BackendError(f"the grid of the {name} must be {fits}, not {tuple(values.shape)}")
        if not values.is_contiguous():
            raise BackendError(f"the grid of the {name} is not contiguous; call contiguous() on it")
    return [int(values.numel() > 1) for values in (scale, zero_point)]


def _expanded(mask: Tensor | None, shape: tuple[int, ...]) -> tuple[str, Tensor | None, tuple[int, ...]]:
    """The kind of a mask, the tensor that the kernel reads, and its four strides, 0 along broadcast axes."""
    if mask is None:
        return "none", None, (0, 0, 0, 0)
    if mask.dtype != torch.bool and mask.dtype not in FLOATS:
        raise BackendError(f"a mask must be of bool, float32, bfloat16 or float16, not {mask.dtype}")
    try:
        steps = mask.expand(shape).stride()
    except RuntimeError:
        raise BackendError(f"the mask {tuple(mask.shape)} does not broadcast to scores of {shape}") from None
    if (shape[2] - 1) * steps[2] + (shape[3] - 1) * steps[3] >= 2**31:
        raise BackendError(f"the mask {tuple(mask.shape)} spans >= 2**31 entries per head; call contiguous() on it")
    if mask.dtype == torch.bool:
        return "bool", mask.view(torch.uint8), steps
    return "float", mask, steps


def _fake_attention(
    q: Tensor,
    q_scale: Tensor,
    q_zero_point: Tensor,
    k: Tensor,
    k_scale: Tensor,
    k_zero_point: Tensor,
    v: Tensor,
    v_scale: Tensor,
    v_zero_point: Tensor,
    mask: Tensor | None,
    softmax_scale: Tensor,
    softmax_zero_point: Tensor,
    softmax_qmax: int,
    out_scale: Tensor | None,
    out_zero_point: Tensor | None,
    qmax: int,
    out_dtype: torch.dtype,
) -> Tensor:
    batch, heads, tokens, _ = q.shape
    return q.new_empty((batch, tokens, heads, v.shape[3]), dtype=out_dtype if out_scale is None else torch.int8)


define_kernel(
    "triton_attention(Tensor q, Tensor q_scale, Tensor q_zero_point, Tensor k, Tensor k_scale, Tensor k_zero_point, "
    "Tensor v, Tensor v_scale, Tensor v_zero_point, Tensor? mask, Tensor softmax_scale, Tensor softmax_zero_point, "
    "int softmax_qmax, Tensor? out_scale, Tensor? out_zero_point, int qmax, ScalarType out_dtype) -> Tensor",
    int8_attention,
    _fake_attention,
    ("CUDA", "CPU"),
)
