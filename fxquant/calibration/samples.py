"""Calibration calls that are kept to be run again: as many as asked for, spread over all there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from fxquant.capture.calls import BATCH, TensorSpec
from fxquant.capture.graph import CapturedGraph

T = TypeVar("T")


class Spread(Generic[T]):
    """Keeps some of a stream of unknown length, evenly spread over it.

    Every so many are kept; when there are twice as many as wanted, every other one is dropped, and half as many kept
    from then on.

    Args:
        wanted: How many to end with, 0 for none.
    """

    def __init__(self, wanted: int) -> None:
        self.wanted = wanted
        self.held: list[T] = []
        self._stride = 1
        self._seen = 0

    def wants_next(self) -> bool:
        """Whether what comes next is to be kept; if so, :meth:`keep` it."""
        number = self._seen
        self._seen += 1
        if not self.wanted or number % self._stride:
            return False
        if len(self.held) >= 2 * self.wanted:
            self.held = self.held[::2]
            self._stride *= 2
            return not number % self._stride
        return True

    def keep(self, item: T) -> None:
        """Keep what :meth:`wants_next` said to keep."""
        self.held.append(item)

    def chosen(self) -> list[T]:
        """As many as were wanted, or all that there are."""
        if len(self.held) <= self.wanted:
            return list(self.held)
        return [self.held[number * len(self.held) // self.wanted] for number in range(self.wanted)]


def some_samples(captured: CapturedGraph, leaves: Sequence[Any], most: int) -> tuple[list[Any], Tensor | None]:
    """The leaves of a call with at most so many of its samples, copied, and which these are; None without a batch."""
    batch = captured.call.batch_size(leaves)
    chosen = torch.linspace(0, batch - 1, min(batch, most), dtype=torch.float32).long() if batch > 0 else None

    def take(leaf: Any, spec: Any) -> Any:
        if isinstance(leaf, Tensor) and isinstance(spec, TensorSpec) and BATCH in spec.shape and chosen is not None:
            return leaf.index_select(spec.shape.index(BATCH), chosen.to(leaf.device))
        return leaf.clone() if isinstance(leaf, Tensor) else leaf

    return [take(leaf, spec) for leaf, spec in zip(leaves, captured.call.leaves, strict=True)], chosen
