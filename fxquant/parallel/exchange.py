"""What ranks exchange within a graph. Graphs call these functions by name, with the name of a process group."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_collectives = torch.ops._c10d_functional


def share_of(x: Tensor, axis: int, runs: Sequence[int], rank: int, size: int) -> Tensor:
    """The part of a whole value that a rank holds: its share of each run along the axis."""
    shares = []
    start = 0
    for run in runs:
        shares.append(x.narrow(axis, start + rank * run // size, run // size))
        start += run
    return shares[0] if len(shares) == 1 else torch.cat(shares, axis)


def gathered(x: Tensor, axis: int, runs: Sequence[int], size: int, group: str) -> Tensor:
    """The whole value, from the parts that all ranks hold. It has the same bits on all ranks."""
    flat = _collectives.wait_tensor(_collectives.all_gather_into_tensor(x.contiguous().reshape(-1), size, group))
    parts = flat.reshape(size, *x.shape)
    pieces = parts.split([run // size for run in runs], axis + 1)
    return torch.cat([piece.movedim(0, axis).flatten(axis, axis + 1) for piece in pieces], axis)


def summed(x: Tensor, group: str) -> Tensor:
    """The sum of the values of all ranks. It has the same bits on all ranks."""
    summed: Tensor = _collectives.wait_tensor(_collectives.all_reduce(x.contiguous(), "sum", group))
    return summed


def extremes(x: Tensor, group: str) -> Tensor:
    """The least and the largest element of each row over all ranks, ``[..., 2]``; rows are divided between ranks."""
    low, high = torch.aminmax(x, dim=-1)
    both = _collectives.all_reduce(torch.stack([-low, high], -1), "max", group)
    low, high = _collectives.wait_tensor(both).unbind(-1)
    return torch.stack([-low, high], -1)


def with_bias(y: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A sum over ranks with the bias, which is added once, in a dtype; contiguous."""
    return (y if bias is None else y + bias.to(y.dtype)).to(dtype).contiguous()


def with_branch(y: Tensor, inner: Tensor, b: Tensor, offset: Tensor | None, strength: Tensor) -> Tensor:
    """The end of a branch of low rank: ``y + strength * b (inner + offset)``, of the dtype of ``y`` and contiguous."""
    if offset is not None:
        inner = inner + offset.to(inner.dtype)
    branch = torch.nn.functional.linear(inner * strength.to(inner.dtype), b.to(inner.dtype))
    return (y + branch.to(y.dtype)).contiguous()


def inner_of(x: Tensor, a: Tensor, group: str) -> Tensor:
    """The first product of a branch of low rank, ``a x``, of an input whose channels are divided between ranks."""
    dtype = torch.promote_types(x.dtype, a.dtype)
    return summed(torch.nn.functional.linear(x.to(dtype), a.to(dtype)), group)
