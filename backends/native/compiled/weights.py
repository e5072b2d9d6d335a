"""Weights in panels, as the compiled kernels read them, and the conversion back to packed codes.

A panel is 32 output channels. For each group of input channels it holds 128 bytes. A group has four channels with one
code per byte or, for codes of up to 4 bits, eight channels with the first four in the low halves of the bytes. Codes of
8 bits, of float formats too, are stored minus 128, as int8; all other codes are stored unchanged. Nothing is lost:
:func:`unpacked` recovers every code.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from fxquant.numerics.packing import pack, unpack

PANEL = 32
_ROWS = 256
MIDDLE = 128
MAX_FEATURES = (2**31 - 1) // (255 * 255)
"""The most input channels for which 32-bit sums of products and zero-point terms cannot overflow."""


def in_halves(bits: int, packed: bool, group_size: int = 0) -> bool:
    """Whether two codes share a byte. Groups have to hold whole runs of eight channels then."""
    return packed and bits <= 4 and group_size % 8 == 0


def sums_groups(group_size: int) -> bool:
    """Whether the kernel adds up groups of this many inputs; 0 means one group."""
    return group_size % 4 == 0


def panels(codes: Tensor, bits: int, in_features: int, halves: bool) -> Tensor:
    """Panels `[ceil(out / 32), ceil(in / each), 128]`, uint8 of two codes per byte (each 8) or int8 of one (each 4).

    Args:
        codes: uint8 `[out, packed_size(in_features, bits)]`, packed as by :func:`fxquant.numerics.packing.pack`.
        bits: Bits per code, 2 to 8.
        in_features: Codes per row.
        halves: Whether two codes share a byte.
    """
    values = unpack(codes, bits, in_features)
    if bits == 8:
        values = values ^ MIDDLE
    each = 8 if halves else 4
    out = values.shape[0]
    values = pad(values, (0, -in_features % each, 0, -out % PANEL))
    held = values.view(-1, PANEL, values.shape[1] // each, each).transpose(1, 2)
    if halves:
        return (held[..., :4] | held[..., 4:] << 4).flatten(2)
    return held.flatten(2).view(torch.int8)


def unpacked(held: Tensor, bits: int, out_features: int, in_features: int) -> Tensor:
    """Undo :func:`panels`."""
    values = held.view(torch.uint8).unflatten(2, (PANEL, 4))
    if held.dtype == torch.uint8:
        values = torch.cat([values & 15, values >> 4], -1)
    values = values.transpose(1, 2).reshape(held.shape[0] * PANEL, -1)[:out_features, :in_features]
    if bits == 8:
        values = values ^ MIDDLE
    return pack(values.contiguous(), bits)


def scale_panels(scale: Tensor) -> Tensor:
    """Scales `[out, groups]` as `[ceil(out / 32), groups, 32]` of the same dtype; those beyond the outputs are 0."""
    return pad(scale, (0, 0, 0, -scale.shape[0] % PANEL)).unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()


def scales(held: Tensor, out_features: int) -> Tensor:
    """Undo :func:`scale_panels`."""
    return held.transpose(1, 2).flatten(0, 1)[:out_features].contiguous()


def sums(codes: Tensor, bits: int, in_features: int) -> Tensor:
    """The sum of the held codes of each output channel, int32 `[out]`."""
    rows = codes.split(_ROWS)  # One sum over all rows would hold all codes as int32.
    values = torch.cat([unpack(part, bits, in_features).sum(1, dtype=torch.int32) for part in rows])
    return values - (MIDDLE * in_features if bits == 8 else 0)


def group_sums(
    codes: Tensor, scale: Tensor, zero_point: Tensor, bits: int, in_features: int, group_size: int
) -> Tensor:
    """The sum of the real weights of each output channel, float32 `[out]`, of a weight in groups.

    Args:
        codes: uint8 `[out, packed_size(in_features, bits)]`.
        scale: float32 `[out, groups]`.
        zero_point: uint8 `[out, groups]`.
        bits: Bits per code.
        in_features: Codes per row.
        group_size: Codes per group; the last group may have fewer.
    """
    groups = scale.shape[1]
    sizes = torch.full((groups,), group_size)
    sizes[-1] = in_features - group_size * (groups - 1)

    def of(part: Tensor, step: Tensor, zero: Tensor) -> Tensor:
        values = pad(unpack(part, bits, in_features), (0, groups * group_size - in_features))
        totals = values.view(-1, groups, group_size).sum(2, dtype=torch.int64) - zero.to(torch.int64) * sizes
        return (totals * step.to(torch.float64)).sum(1).to(torch.float32)

    parts = zip(codes.split(_ROWS), scale.split(_ROWS), zero_point.split(_ROWS), strict=True)
    return torch.cat([of(*part) for part in parts])
