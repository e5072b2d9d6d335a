"""Weights as the Triton kernels read them, and the way back to packed codes.

A weight is held as rows of its input channels, one byte each, int8:

* codes of up to 7 bits less their zero point, which always fits,
* codes of 8 bits less 128; what is missing is added in the kernel by the sums of the inputs, and is nothing where all
  zero points are 128.

Codes of up to 4 bits may be held two a byte, uint8: of each run of 2 HALF inputs the first half lies in the low halves
of HALF bytes and the second in the high ones, so that a kernel unpacks both with one operation each and no shuffle. All
these lead back to the codes. Weights held in 8-bit floats do not, see :func:`floats`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from fxquant.numerics import weights as reference
from fxquant.numerics.packing import pack, unpack

MIDDLE = 128
MAX_FEATURES = (2**31 - 1) // (255 * 255)
"""Input channels whose products, and what zero points add to them, certainly fit 32-bit sums."""

FP8_MAX = 448.0
LEAST_GROUP = 32
"""Inputs that tensor cores multiply at once."""

_ROWS = 256


def fits_groups(group_size: int, bits: int) -> bool:
    """Whether the kernel takes weights in groups of so many inputs; those of 8 bits would need sums of the inputs."""
    return group_size % LEAST_GROUP == 0 and bits < 8


def half_of(group_size: int) -> int:
    """HALF: a half never reaches over the end of a group."""
    return 64 if group_size % 64 == 0 else LEAST_GROUP


def held_width(in_features: int, halves: bool, group_size: int) -> int:
    """Bytes a row."""
    if not halves:
        return in_features
    half = half_of(group_size)
    return -(-in_features // (2 * half)) * half


def in_halves(bits: int, packed: bool) -> bool:
    """Whether two codes share a byte."""
    return packed and bits <= 4


def held(packed: Tensor, zero_point: Tensor, bits: int, in_features: int, halves: bool, group_size: int) -> Tensor:
    """The held weight: int8 `[out, in]`, or uint8 `[out, held_width]` of two codes a byte.

    Args:
        packed: uint8 `[out, packed_size(in, bits)]`.
        zero_point: uint8 `[out, groups]`.
        bits: Bits a code, 2 to 8.
        in_features: Codes a row.
        halves: Whether two codes share a byte.
        group_size: Inputs a group, 0 for one group.
    """
    codes = unpack(packed, bits, in_features)
    if not halves:
        return _signed(codes, zero_point, bits, group_size)
    half = half_of(group_size)
    runs = pad(codes, (0, -in_features % (2 * half))).unflatten(1, (-1, 2, half))
    return (runs[:, :, 0] | runs[:, :, 1] << 4).flatten(1)


def unpacked(weight: Tensor, zero_point: Tensor, bits: int, in_features: int, group_size: int) -> Tensor:
    """Undo :func:`held`."""
    if weight.dtype == torch.uint8:
        runs = weight.unflatten(1, (-1, half_of(group_size)))
        return pack(torch.stack([runs & 15, runs >> 4], 2).flatten(1)[:, :in_features].contiguous(), bits)
    offset = MIDDLE if bits == 8 else _spread(zero_point, in_features, group_size).to(torch.int16)
    return pack((weight.to(torch.int16) + offset).to(torch.uint8).contiguous(), bits)


def sums(packed: Tensor, scale: Tensor, zero_point: Tensor, bits: int, in_features: int, group_size: int) -> Tensor:
    """Sums of each row: of the weight less its zero points, or of codes of 8 bits less 128, int32 `[out]`.

    In groups they are of real values, float32.
    """
    rows = packed.split(_ROWS)  # A sum of all at once would hold them all as integers.
    zeros, scales = zero_point.split(_ROWS), scale.split(_ROWS)
    parts = []
    for part, zero, step in zip(rows, zeros, scales, strict=True):
        values = _signed(unpack(part, bits, in_features), zero, bits, group_size)
        if group_size:
            parts.append((values.double() * _spread(step, in_features, group_size).double()).sum(1).float())
        else:
            parts.append(values.sum(1, dtype=torch.int32))
    return torch.cat(parts)


def offset(zero_point: Tensor, bits: int) -> Tensor | None:
    """What the held weight has over the weight, in codes: int32 `[out]`; None for nothing."""
    if bits < 8 or bool((zero_point == MIDDLE).all()):
        return None
    return zero_point.flatten().to(torch.int32) - MIDDLE


def floats(
    packed: Tensor, scale: Tensor, zero_point: Tensor, bits: int, in_features: int, group_size: int
) -> tuple[Tensor, Tensor]:
    """The weight in 8-bit floats, float8_e4m3fn `[out, in]`, and a scale for each row, float32 `[out, 1]`.

    Its values are rounded to three bits behind the first, so that codes of 8 bits are not found again.
    """
    real = reference.dequantize_weight(packed, scale, zero_point, bits, group_size, in_features, torch.float32)
    step = real.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / FP8_MAX
    return (real / step).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), step


def _signed(codes: Tensor, zero_point: Tensor, bits: int, group_size: int) -> Tensor:
    if bits == 8:
        return (codes ^ MIDDLE).view(torch.int8)
    return (codes.to(torch.int16) - _spread(zero_point, codes.shape[1], group_size).to(torch.int16)).to(torch.int8)


def _spread(values: Tensor, in_features: int, group_size: int) -> Tensor:
    """A value for every input, of those of groups."""
    if not group_size:
        return values
    return values.repeat_interleave(group_size, 1)[:, :in_features]
