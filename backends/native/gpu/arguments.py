"""Converts arguments of operators to what kernels read: grids per row, vectors per sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxquant.backends.native.library import FLOATS
from fxquant.errors import BackendError

FP8 = torch.float8_e4m3fn
CODES = (torch.int8, FP8)
"""Dtypes of activations that the matrix-product kernel multiplies."""


def check_floats(op: str, x: Tensor) -> None:
    """Refuse dtypes that kernels do not read as values."""
    if x.dtype not in FLOATS:
        raise BackendError(f"{op} reads float32, bfloat16 and float16, not {x.dtype}")


def check_zero_point(op: str, dtype: torch.dtype, zero_point: Tensor | None) -> None:
    """Integers have zero points, and 8-bit floats have none."""
    if (zero_point is None) != (dtype == FP8):
        what = "8-bit floats have no zero point" if dtype == FP8 else "integers need a zero point"
        raise BackendError(f"{op} was called {'without' if zero_point is None else 'with'} a zero point: {what}")


def per_row(values: Any, x: Tensor, rows: int, what: str) -> tuple[Any, int]:
    """The entries of a grid in contiguous memory, and how many rows of `x` share one entry."""
    if values is None:
        return None, 1
    count = values.numel()
    if count == 1:
        return values, rows
    leading = tuple(values.shape[:-1])
    # One entry per sample or one per row: the axes that have entries come first.
    each_sample = leading[:1] == (count,) == tuple(x.shape[:1]) and values.dim() <= x.dim()
    known = leading == tuple(x.shape[:-1]) or each_sample
    if values.shape[-1] != 1 or not known:
        raise BackendError(f"the {what} {tuple(values.shape)} does not fit rows of {tuple(x.shape)}")
    return values.contiguous(), rows // count


def vectors(values: Any, x: Tensor, rows: int, channels: int, what: str) -> tuple[Any, int, int]:
    """Vectors over the channels, how many rows of `x` share one vector, and the stride between vectors."""
    if values is None:
        return None, 1, 0
    count = values.numel() // channels if channels else 0
    alone = count == values.shape[0] == x.shape[0] and 1 < values.dim() <= x.dim()
    if values.shape[-1] != channels or not (count == 1 or alone):
        raise BackendError(
            f"the {what} {tuple(values.shape)} is not a vector of {channels} channels, one for all or one per sample"
        )
    flat = values.reshape(count, channels)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    return flat, rows // count, flat.stride(0)
