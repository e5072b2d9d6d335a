"""Brings the factors of adapters into the coordinates of a layer that passes have rewritten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.ir.layer_changes import LayerChange
from fxquant.numerics.hadamard import rotate


@dataclass(frozen=True)
class Delta:
    """What one adapter adds to the weight of a layer: ``scale * b a``.

    Attributes:
        a: ``[rank, in]``.
        b: ``[out, rank]``.
        scale: Alpha by rank, times the weight that the user gave the adapter.
    """

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True)
class Folded:
    """The tensors of one branch, float64, adapters side by side along the rank.

    Attributes:
        a: ``[rank, in]``.
        b: ``[out, rank]``.
        offset: ``[bins, rank]``, or None if the input of the layer is not shifted.
    """

    a: Tensor
    b: Tensor
    offset: Tensor | None


def folded(deltas: Sequence[Delta], change: LayerChange) -> Folded:
    """Fold the changes of a layer into the factors of adapters.

    With ``x = columns * x' + shift`` and ``y' = rows * y + constant``, the branch ``y' += rows * scale * b (a x)`` is::

        y' += (rows * scale * b) ((a * columns) x' + a shift)

    so it is exact in real arithmetic, whatever the adapters are. Rotations of the input and of the output apply to
    the columns of ``a * columns`` and to the rows of ``rows * scale * b``.
    """
    a = torch.cat([delta.a.double() for delta in deltas])
    b = torch.cat([delta.scale * delta.b.double() for delta in deltas], dim=1)
    rows = change.rows.to(b.device).reshape(-1, 1)
    offset = None if change.shift is None else change.shift.rows.to(a.device) @ a.T
    a, b = a * change.columns.to(a.device), b * rows
    if change.turned is not None:  # Of an orthogonal matrix, the branch takes the same as the weight.
        a = rotate(a, change.turned.signs, change.turned.block)
    if change.rows_turned is not None:
        b = change.rows_turned.apply(b, 0)
    return Folded(a, b, offset)


def padded(value: Tensor, rank: int, dim: int) -> Tensor:
    """The value with zeros behind it along one axis, up to a rank. Zeros add nothing to a branch."""
    shape = list(value.shape)
    shape[dim] = rank - shape[dim]
    return torch.cat([value, value.new_zeros(shape)], dim=dim)
