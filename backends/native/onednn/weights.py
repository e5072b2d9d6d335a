"""Weights as oneDNN's kernels read them, and the conversion back to packed codes.

A code q of a weight stands for `scale * (q - zero_point)`. Kernels multiply int8, so a weight is held as

* `q - zero_point` for codes of up to 7 bits, which always fits int8, or
* `q - 128` for codes of 8 bits. The missing part, `scale * (128 - zero_point)` per output channel, times the sum of the
  input, is added to the result. It is 0 on symmetric grids.

Both are exact and lose nothing: :func:`unpacked` recovers every code.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from fxquant.errors import BackendError
from fxquant.numerics.packing import pack, unpack

MIDDLE = 128
MAX_FEATURES = (2**31 - 1) // (255 * 128)
"""The most input channels for which 32-bit sums cannot overflow."""


def prepacked(packed: Tensor, zero_point: Tensor, bits: int, in_features: int) -> Tensor:
    """Prepacked int8 `[in, out]` in a layout of oneDNN, from uint8 codes of :func:`~fxquant.numerics.packing.pack`.

    Args:
        packed: `[out, packed_size(in_features, bits)]`.
        zero_point: uint8 `[out, 1]`.
        bits: Bits per code, 2 to 8.
        in_features: Codes per row.
    """
    return torch.ops.onednn.qlinear_prepack(_signed(unpack(packed, bits, in_features), zero_point, bits), None)


def unpacked(weight: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Undo :func:`prepacked`."""
    values = weight.to_dense().t().to(torch.int16)
    offset = MIDDLE if bits == 8 else zero_point.to(torch.int16)
    return pack((values + offset).to(torch.uint8).contiguous(), bits)


def to_bytes(weight: Tensor) -> Tensor:
    """The content of a prepacked weight, uint8 `[bytes]`: two sizes, the layout's description and the memory."""
    memory = torch.empty(torch.ops.mkldnn._nbytes(weight), dtype=torch.uint8)
    ctypes.memmove(memory.data_ptr(), torch.ops.mkldnn.data_ptr(weight), memory.numel())
    return torch.cat([torch.tensor(weight.shape).view(torch.uint8), _layout(weight), memory])


def from_bytes(stored: Tensor) -> Tensor:
    """Undo :func:`to_bytes`, in a thirtieth of the time that prepacking takes.

    Raises:
        BackendError: If oneDNN uses another memory layout for such a weight on this machine.
    """
    in_features, out_features = stored[:16].clone().view(torch.int64).tolist()
    template = _template(in_features, out_features)
    layout = _layout(template)
    end = 16 + layout.numel()
    memory = stored[end:]
    if not torch.equal(stored[16:end], layout) or memory.numel() != torch.ops.mkldnn._nbytes(template):
        raise BackendError(
            "the package holds prepacked weights in the oneDNN memory layout of the machine on which it was made, and "
            "oneDNN uses another layout on this machine; export it here"
        )
    weight = template.clone()
    ctypes.memmove(torch.ops.mkldnn.data_ptr(weight), memory.data_ptr(), memory.numel())
    return weight


def _layout(weight: Tensor) -> Tensor:
    found: Tensor = torch.ops.mkldnn._get_mkldnn_serialized_md(weight)
    return found


@functools.cache
def _template(in_features: int, out_features: int) -> Tensor:
    return torch.ops.onednn.qlinear_prepack(torch.zeros(out_features, in_features, dtype=torch.int8), None)


def sums(packed: Tensor, zero_point: Tensor, bits: int, in_features: int) -> Tensor:
    """The sum of the held int8 values of each output channel, int32 `[out]`."""
    return _signed(unpack(packed, bits, in_features), zero_point, bits).sum(1, dtype=torch.int32)


def missing_offset(scale: Tensor, zero_point: Tensor, bits: int) -> Tensor | None:
    """The weight minus the held weight, float32 `[out]`, the same for all input channels; None if they are equal."""
    if bits < 8 or bool((zero_point == MIDDLE).all()):
        return None
    return ((MIDDLE - zero_point.to(torch.float32)) * scale).flatten()


def _signed(codes: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return (codes ^ MIDDLE).view(torch.int8)
    return (codes.to(torch.int16) - zero_point.to(torch.int16)).to(torch.int8)
