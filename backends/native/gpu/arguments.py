"""Arguments of operators as kernels read them: grids by rows, vectors by samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxquant.backends.native.library import FLOATS
from fxquant.errors import BackendError

FP8 = torch.float8_e4m3fn
CODES = (torch.int8, FP8)
"""Dtypes of activations that the product's kernel multiplies."""


def check_floats(op: str, x: Tensor) -> None:
    """Refuse what kernels do not read as values."""
    if x.dtype not in FLOATS:
        raise BackendError(f"{op} reads float32, bfloat16 and float16, not {x.dtype}")


def per_row(values: Any, x: Tensor, rows: int, what: str) -> tuple[Any, int]:
    """Entries of a grid in a row, and how many rows of `x` share one."""
    if values is None:
        return None, 1
    count = values.numel()
    if count == 1:
        return values, rows
    leading = tuple(values.shape[:-1])
    # One a sample, or one a row: the axes that have entries come first.
    each_sample = leading[:1] == (count,) == tuple(x.shape[:1]) and values.dim() <= x.dim()
    known = leading == tuple(x.shape[:-1]) or each_sample
    if values.shape[-1] != 1 or not known:
        raise BackendError(f"the {what} {tuple(values.shape)} does not fit rows of {tuple(x.shape)}")
    return values.contiguous(), rows // count


def vectors(values: Any, x: Tensor, rows: int, channels: int, what: str) -> tuple[Any, int, int]:
    """Vectors of the channels, how many rows of `x` share one, and how far they are apart in memory."""
    if values is None:
        return None, 1, 0
    count = values.numel() // channels if channels else 0
    alone = count == values.shape[0] == x.shape[0] and 1 < values.dim() <= x.dim()
    if values.shape[-1] != channels or not (count == 1 or alone):
        raise BackendError(
            f"the {what} {tuple(values.shape)} is no vector of {channels} channels, one for all or one a sample"
        )
    flat = values.reshape(count, channels)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    return flat, rows // count, flat.stride(0)
