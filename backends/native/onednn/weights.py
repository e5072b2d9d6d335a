"""Weights as oneDNN's kernels read them, and the way back to packed codes.

A code q of a weight stands for `scale * (q - zero_point)`. Kernels multiply int8, so a weight is held as

* `q - zero_point` for codes of up to 7 bits, which always fits, or
* `q - 128` for codes of 8 bits. What is missing, `scale * (128 - zero_point)` an output channel, times the sum of the
  input, is added to the result. It vanishes on symmetric grids.

Both are exact and lose nothing: :func:`unpacked` finds every code again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.packing import pack, unpack

MIDDLE = 128
MAX_FEATURES = (2**31 - 1) // (255 * 128)
"""Input channels whose products certainly fit 32-bit sums."""


def prepacked(packed: Tensor, zero_point: Tensor, bits: int, in_features: int) -> Tensor:
    """Prepacked int8 `[in, out]` in a layout of oneDNN, from uint8 codes packed as by :func:`fxquant.packing.pack`.

    Args:
        packed: `[out, packed_size(in_features, bits)]`.
        zero_point: uint8 `[out, 1]`.
        bits: Bits a code, 2 to 8.
        in_features: Codes a row.
    """
    return laid_out(_signed(unpack(packed, bits, in_features), zero_point, bits))


def laid_out(values: Tensor) -> Tensor:
    """Prepacked int8 `[in, out]`, in the layout that is best on this machine, from int8 values `[out, in]`."""
    return torch.ops.onednn.qlinear_prepack(values.contiguous(), None)


def unpacked(weight: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Undo :func:`prepacked`."""
    values = weight.to_dense().t().to(torch.int16)
    offset = MIDDLE if bits == 8 else zero_point.to(torch.int16)
    return pack((values + offset).to(torch.uint8).contiguous(), bits)


def sums(packed: Tensor, zero_point: Tensor, bits: int, in_features: int) -> Tensor:
    """The sum of the held int8 values of each output channel, int32 `[out]`."""
    return _signed(unpack(packed, bits, in_features), zero_point, bits).sum(1, dtype=torch.int32)


def missing_offset(scale: Tensor, zero_point: Tensor, bits: int) -> Tensor | None:
    """What the held weight lacks of the weight, float32 `[out]`, the same for all input channels; None for nothing."""
    if bits < 8 or bool((zero_point == MIDDLE).all()):
        return None
    return ((MIDDLE - zero_point.to(torch.float32)) * scale).flatten()


def _signed(codes: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return (codes ^ MIDDLE).view(torch.int8)
    return (codes.to(torch.int16) - zero_point.to(torch.int16)).to(torch.int8)
