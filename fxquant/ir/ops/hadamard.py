"""The operator that rotates the channels of an activation at run time."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.errors import ConfigurationError
from fxquant.ir.ops.definition import define
from fxquant.numerics.grids import compute_dtype
from fxquant.numerics.hadamard import check_block, rotate


def hadamard(x: Tensor, signs: Tensor, block: int) -> Tensor:
    """`(x * signs) H`, rounded once to the dtype of `x`.

    `x` is `[..., channels]`, `signs` int8 `[channels]` of 1 and -1. `H` holds the Hadamard matrix of size `block`, a
    power of two, divided by the root of its size, once for every `block` channels. The result has the shape and dtype
    of `x` and is contiguous.
    """
    _check(x, signs, block)
    with torch.autocast(x.device.type, enabled=False):
        return rotate(x.to(compute_dtype(x.dtype)), signs, block).to(x.dtype).contiguous()


def _fake_hadamard(x: Tensor, signs: Tensor, block: int) -> Tensor:
    _check(x, signs, block)
    return x.new_empty(x.shape)


def _check(x: Tensor, signs: Tensor, block: int) -> None:
    channels = x.shape[-1]
    if tuple(signs.shape) != (channels,) or signs.dtype != torch.int8:
        raise ConfigurationError(
            f"the signs of {channels} channels are int8 [{channels}], not {signs.dtype} {tuple(signs.shape)}."
        )
    check_block(block, channels)


define("hadamard(Tensor x, Tensor signs, int block) -> Tensor", hadamard, _fake_hadamard)
