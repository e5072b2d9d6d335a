"""Converts weights to the layout that the Triton kernels read, and back to packed codes.

A weight is stored as rows of its input channels, one byte per channel, int8:

* codes of up to 7 bits minus their zero point, which always fits,
* codes of 8 bits minus 128. If some zero point is not 128, the kernel corrects the difference with the sums of the
  inputs.

Codes of up to 4 bits may be stored two per byte, uint8. Of each run of 2 HALF inputs, the first half is in the low
4 bits of HALF bytes and the second half is in the high 4 bits, so a kernel unpacks each half with one operation and no
shuffle. All these layouts can be converted back to codes. Codes of float formats have no zero point and stay as they
are; for products of ``fp8`` they are the bytes of 8-bit floats.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from fxquant.numerics.packing import pack, unpack

MIDDLE = 128
MAX_FEATURES = (2**31 - 1) // (255 * 255)
"""The most input channels for which the sums, including the terms of zero points, always fit 32 bits."""

LEAST_GROUP = 32
"""Inputs that tensor cores multiply in one instruction."""

_ROWS = 256


def fits_groups(group_size: int, bits: int) -> bool:
    """Whether the kernel accepts weights in groups of `group_size` inputs; 8-bit ones would need sums of the inputs."""
    return group_size % LEAST_GROUP == 0 and bits < 8


def half_of(group_size: int) -> int:
    """The value of HALF. A half never crosses the end of a group."""
    return 64 if group_size % 64 == 0 else LEAST_GROUP


def held_width(in_features: int, halves: bool, group_size: int) -> int:
    """Bytes per row of the stored weight."""
    if not halves:
        return in_features
    half = half_of(group_size)
    return -(-in_features // (2 * half)) * half


def in_halves(bits: int, packed: bool) -> bool:
    """Whether two codes share a byte."""
    return packed and bits <= 4


def kernel_codes(
    packed: Tensor, zero_point: Tensor | None, bits: int, in_features: int, halves: bool, group_size: int
) -> Tensor:
    """The stored weight: int8 `[out, in]`, or uint8 `[out, held_width]` with two codes per byte.

    Args:
        packed: uint8 `[out, packed_size(in, bits)]`.
        zero_point: uint8 `[out, groups]`; None for float formats.
        bits: Bits per code, 2 to 8.
        in_features: Codes per row.
        halves: Whether two codes share a byte.
        group_size: Inputs per group, 0 for one group.
    """
    codes = unpack(packed, bits, in_features)
    if not halves:
        return _signed(codes, zero_point, bits, group_size)
    half = half_of(group_size)
    runs = pad(codes, (0, -in_features % (2 * half))).unflatten(1, (-1, 2, half))
    return (runs[:, :, 0] | runs[:, :, 1] << 4).flatten(1)


def unpacked(weight: Tensor, zero_point: Tensor | None, bits: int, in_features: int, group_size: int) -> Tensor:
    """Undo :func:`kernel_codes`."""
    if weight.dtype == torch.uint8:
        runs = weight.unflatten(1, (-1, half_of(group_size)))
        return pack(torch.stack([runs & 15, runs >> 4], 2).flatten(1)[:, :in_features].contiguous(), bits)
    if zero_point is None:
        return pack(weight.view(torch.uint8), bits)
    offset = MIDDLE if bits == 8 else _spread(zero_point, in_features, group_size).to(torch.int16)
    return pack((weight.to(torch.int16) + offset).to(torch.uint8).contiguous(), bits)


def sums(packed: Tensor, scale: Tensor, zero_point: Tensor, bits: int, in_features: int, group_size: int) -> Tensor:
    """Sums of each row: of codes minus their zero points, or of 8-bit codes minus 128, int32 `[out]`.

    With groups, they are sums of the dequantized values, float32.
    """
    rows = packed.split(_ROWS)  # Summing all rows at once would keep all unpacked codes in memory.
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
    """The stored weight minus the true weight, in codes: zero point minus 128, int32 `[out]`; None if all are zero."""
    if bits < 8 or bool((zero_point == MIDDLE).all()):
        return None
    return zero_point.flatten().to(torch.int32) - MIDDLE


def _signed(codes: Tensor, zero_point: Tensor | None, bits: int, group_size: int) -> Tensor:
    if zero_point is None:
        return codes.contiguous().view(torch.int8)
    if bits == 8:
        return (codes ^ MIDDLE).view(torch.int8)
    return (codes.to(torch.int16) - _spread(zero_point, codes.shape[1], group_size).to(torch.int16)).to(torch.int8)


def _spread(values: Tensor, in_features: int, group_size: int) -> Tensor:
    """Repeat the value of each group for each of its inputs."""
    if not group_size:
        return values
    return values.repeat_interleave(group_size, 1)[:, :in_features]
