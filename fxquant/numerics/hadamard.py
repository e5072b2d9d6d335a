"""Rotations of channels by Hadamard matrices, in equal blocks along the channels."""

from __future__ import annotations

import functools

import torch
from scipy.linalg import hadamard as of_size
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from fxquant.errors import ConfigurationError


def largest_block(channels: int) -> int:
    """The largest power of two that divides a number of channels: 128 for 1152."""
    return channels & -channels


def check_block(block: int, channels: int) -> None:
    """Refuse a size that Hadamard matrices along these channels cannot have.

    Raises:
        ConfigurationError: If the size is not a power of two, or does not divide the number of channels.
    """
    if block < 1 or block & (block - 1):
        raise ConfigurationError(f"blocks of {block} channels: the size of a Hadamard matrix here is a power of two.")
    if channels % block:
        raise ConfigurationError(
            f"blocks of {block} channels do not divide {channels}; choose at most {largest_block(channels)}."
        )


@functools.lru_cache(maxsize=64)
def hadamard_matrix(block: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The Hadamard matrix divided by the root of its size: ``[block, block]``, symmetric and orthogonal."""
    with unset_fake_temporarily(), torch.inference_mode(False):  # The next caller may be in another mode.
        return torch.from_numpy(of_size(block)).to(torch.float64).div(block**0.5).to(device, dtype)


def rotate(x: Tensor, signs: Tensor, block: int) -> Tensor:
    """``(x * signs) H``: the last axis of ``x``, with its signs flipped, times a Hadamard matrix in each block.

    Args:
        x: ``[..., channels]``, float32 or float64.
        signs: 1 or -1 per channel, ``[channels]``.
        block: Channels per Hadamard matrix.

    Returns:
        The shape and dtype of ``x``.
    """
    matrix = hadamard_matrix(block, x.dtype, x.device)
    return ((x * signs.to(x.device, x.dtype)).unflatten(-1, (-1, block)) @ matrix).flatten(-2)


def rotate_back(x: Tensor, signs: Tensor, block: int) -> Tensor:
    """The inverse of :func:`rotate`, ``(x H) * signs``; arguments and result are as there."""
    matrix = hadamard_matrix(block, x.dtype, x.device)
    return (x.unflatten(-1, (-1, block)) @ matrix).flatten(-2) * signs.to(x.device, x.dtype)
