"""The operator of low-rank side branches, such as LoRAs, beside a layer that stays as it is."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fxquant.errors import ConfigurationError
from fxquant.ir.ops.definition import check_broadcast, define


def low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, offset: Tensor | None, strength: Tensor) -> Tensor:
    """``y + strength * b (a x + offset)``: the result of a layer, plus a product of low rank of the layer's input.

    `y` is `[..., out]`, `x` is `[..., in]`, `a` is `[rank, in]` and `b` is `[out, rank]`. `offset` broadcasts to
    `[..., rank]`, and `strength` is one number. The branch is computed in the wider of the dtypes of `x` and of `a`,
    so that factors can be stored in 16 bits beside float32 values. The result has the shape and dtype of `y` and is
    contiguous.
    """
    _check(y, x, a, b, offset)
    with torch.autocast(y.device.type, enabled=False):
        return with_branch(y, x, a, b, offset, strength).contiguous()


def with_branch(y: Tensor, x: Tensor, a: Tensor, b: Tensor, offset: Tensor | None, strength: Tensor) -> Tensor:
    """What :func:`low_rank` computes, in ATen ops alone."""
    dtype = torch.promote_types(x.dtype, a.dtype)
    inner = functional.linear(x.to(dtype), a.to(dtype))
    if offset is not None:
        inner = inner + offset.to(dtype)
    branch = functional.linear(inner * strength.to(dtype), b.to(dtype))
    return y + branch.to(y.dtype)


def _fake_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, offset: Tensor | None, strength: Tensor) -> Tensor:
    _check(y, x, a, b, offset)
    return y.new_empty(y.shape)


def _check(y: Tensor, x: Tensor, a: Tensor, b: Tensor, offset: Tensor | None) -> None:
    rank = a.shape[0]
    if tuple(a.shape) != (rank, x.shape[-1]) or tuple(b.shape) != (y.shape[-1], rank):
        raise ConfigurationError(
            f"a branch of a layer with {x.shape[-1]} inputs and {y.shape[-1]} outputs needs [rank, {x.shape[-1]}] and "
            f"[{y.shape[-1]}, rank], not {tuple(a.shape)} and {tuple(b.shape)}."
        )
    if offset is not None:
        check_broadcast("offset", offset, (*x.shape[:-1], rank))


define(
    "low_rank(Tensor y, Tensor x, Tensor a, Tensor b, Tensor? offset, Tensor strength) -> Tensor",
    low_rank,
    _fake_low_rank,
)
