"""Weights as torchao's kernels read them, and the conversion back to packed codes.

A code q of a weight stands for `scale * (q - zero_point)`. Integer products and 8-bit storage take int8 weights that
are symmetric, so a weight is held as

* `q - zero_point` for codes of up to 7 bits, which always fits int8, or
* `q - 128` for codes of 8 bits. The held weight then exceeds the weight by `scale * (zero_point - 128)` per output
  channel. This excess, times the sum of the input, is subtracted from the result. It is 0 on symmetric grids.

Weights of up to 4 bits with float activations are held in 4 bits, as `aten::_weight_int4pack_mm` reads them: each group
of inputs has its own scale and zero point. The kernel computes `(q - 8) * scale + offset` in 16-bit floats. Codes of 2
and 3 bits are therefore moved to be centered on 8, where the two terms do not cancel.

All forms are exact, and every code can be recovered.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.numerics.packing import pack, unpack

MIDDLE = 128
MAX_FEATURES = (2**31 - 1) // (255 * 128)
"""The most input channels for which 32-bit sums cannot overflow."""

_GROUPS = (256, 128, 64, 32)  # Sizes that the 4-bit kernels support.
_CPU_ROWS, _CUDA_ROWS, _CUDA_COLUMNS, _K_TILES = 16, 8, 128, 8


def signed(packed: Tensor, zero_point: Tensor, bits: int, in_features: int) -> Tensor:
    """int8 `[out, in]` from uint8 codes packed as by :func:`fxquant.numerics.packing.pack`.

    Args:
        packed: `[out, packed_size(in_features, bits)]`.
        zero_point: uint8 `[out, 1]`.
        bits: Bits per code, 2 to 8.
        in_features: Codes per row.
    """
    codes = unpack(packed, bits, in_features)
    if bits == 8:
        return (codes ^ MIDDLE).view(torch.int8)
    return (codes.to(torch.int16) - zero_point.to(torch.int16)).to(torch.int8)


def unsigned(weight: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Undo :func:`signed`, also for a weight that was reshaped to the axes of a convolution."""
    values = weight.flatten(1).to(torch.int16)
    offset = MIDDLE if bits == 8 else zero_point.to(torch.int16)
    return pack((values + offset).to(torch.uint8).contiguous(), bits)


def excess(scale: Tensor, zero_point: Tensor, bits: int) -> Tensor | None:
    """The held weight minus the weight, float32 `[out]`, the same for all inputs; None if they are equal."""
    if bits < 8 or bool((zero_point == MIDDLE).all()):
        return None
    return ((zero_point.to(torch.float32) - MIDDLE) * scale).flatten()


def fits_byte_kernel(in_features: int) -> bool:
    """Whether `aten::_weight_int8pack_mm` takes this many inputs. It reads 16 at a time, even past the weight's end."""
    return in_features % 16 == 0


def group_of_four_bits(out_features: int, in_features: int, group_size: int, device: str) -> int | None:
    """The kernel's group size for a 4-bit weight; None if the kernels do not take such a weight.

    A larger group of the weight becomes several groups of the kernel with equal grids.
    """
    group = next((size for size in _GROUPS if (group_size or in_features) % size == 0), None)
    if device == "cpu":
        return group if out_features % _CPU_ROWS == 0 else None
    return group if out_features % _CUDA_ROWS == 0 and in_features % _CUDA_COLUMNS == 0 else None


def four_bits(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """Codes of up to 4 bits in the layout of this device's kernel, which only :func:`from_four_bits` can read."""
    codes = unpack(packed, bits, in_features) + _moved(bits)
    if codes.device.type == "cpu":
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    pairs = codes[:, ::2] << 4 | codes[:, 1::2]
    return torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), _K_TILES)


def from_four_bits(weight: Tensor, out_features: int, in_features: int, bits: int) -> Tensor:
    """Undo :func:`four_bits`: the kernel's product with the identity matrix, on a grid with step 1, gives the codes."""
    device = weight.device
    inputs = torch.eye(in_features, dtype=torch.bfloat16, device=device)
    grid = torch.tensor([1.0, 8.0], dtype=torch.bfloat16, device=device)
    grid = grid.expand(in_features // _GROUPS[-1], out_features, 2).contiguous()
    codes = four_bit_product(inputs, weight, _GROUPS[-1], grid)
    return pack(codes.t().to(torch.uint8).contiguous() - _moved(bits), bits)


def grid_of_four_bits(scale: Tensor, zero_point: Tensor, bits: int, repeats: int) -> Tensor:
    """Scale and offset as the kernel reads them, float32 `[in / group, out, 2]`, from `[out, groups]`.

    Args:
        scale: float32.
        zero_point: uint8.
        bits: Bits per code.
        repeats: Groups of the kernel per group of the weight.
    """
    offset = (2 ** (bits - 1) - zero_point.to(torch.float32)) * scale
    return torch.stack([scale, offset], -1).transpose(0, 1).repeat_interleave(repeats, 0)


def four_bit_product(x: Tensor, weight: Tensor, group: int, grid: Tensor) -> Tensor:
    """`[rows, in]` times a weight of :func:`four_bits`, whose codes stand for `(q - 8) * grid[0] + grid[1]`.

    `grid` is `[in / group, out, 2]`, of the dtype of `x`: bfloat16, and on CPUs float16 too.
    """
    if x.device.type == "cpu":
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, group, grid)
    return torch.ops.aten._weight_int4pack_mm(x, weight, group, grid)


def _moved(bits: int) -> int:
    return 8 - 2 ** (bits - 1)
