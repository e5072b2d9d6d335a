"""Slices of tensors, processed one per thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

T = TypeVar("T")


def is_without_values(tensor: Tensor) -> bool:
    """Whether a tensor is fake or on the device meta, as weights are while a plan is replayed."""
    return is_fake(tensor) or tensor.is_meta


def slices_of(tensor: Tensor) -> Sequence[Tensor]:
    """Slices along the first axis: small enough for the cache of a CPU, or large enough to fill a GPU."""
    if is_without_values(tensor):
        return [tensor]
    elements = 1 << 18 if tensor.device.type == "cpu" else 1 << 24
    return tensor.split(max(1, elements // max(1, tensor[:1].numel())))


def map_slices(function: Callable[..., T], slices: Sequence[tuple[Tensor | None, ...]]) -> list[T]:
    """Call a function on each slice; on a CPU, one slice per thread.

    If torch split the work, each of the many small ops would be a parallel region, and at the end of each region all
    threads would wait for the slowest one. That is several times slower if the cores are shared.
    """
    threads = torch.get_num_threads()
    first = slices[0][0] if slices else None
    if threads == 1 or len(slices) < 2 or first is None or first.device.type != "cpu":
        return [function(*piece) for piece in slices]
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(lambda piece: function(*piece), slices))
    finally:
        torch.set_num_threads(threads)
