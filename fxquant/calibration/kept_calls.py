"""Keeps calibration calls to run them again: the requested number, spread over all calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from fxquant.calibration.samples import RUN_SAMPLES
from fxquant.capture.calls import BATCH, CallSpec, TensorSpec
from fxquant.capture.graph import CapturedGraph
from fxquant.memory.bound import kept
from fxquant.pipeline.conduct import ask
from fxquant.pipeline.pipeline import Pass

T = TypeVar("T")


class Spread(Generic[T]):
    """Keeps some items of a stream of unknown length, spread evenly over the stream.

    Every n-th item is kept. When twice the wanted number is kept, every second one is dropped and n doubles.

    Args:
        wanted: Number of items to choose at the end, 0 for none.
    """

    def __init__(self, wanted: int) -> None:
        self.wanted = wanted
        self.kept: list[T] = []
        self._stride = 1
        self._seen = 0

    def wants_next(self) -> bool:
        """Whether the next item must be kept; if so, pass it to :meth:`keep`."""
        number = self._seen
        self._seen += 1
        if not self.wanted or number % self._stride:
            return False
        if len(self.kept) >= 2 * self.wanted:
            self.kept = self.kept[::2]
            self._stride *= 2
            return not number % self._stride
        return True

    def keep(self, item: T) -> None:
        """Keep the item that :meth:`wants_next` asked for."""
        self.kept.append(item)

    def chosen(self) -> list[T]:
        """The wanted number of items, or all kept items if there are fewer."""
        if len(self.kept) <= self.wanted:
            return list(self.kept)
        return [self.kept[number * len(self.kept) // self.wanted] for number in range(self.wanted)]


def calls_wanted(passes: Sequence[Pass]) -> int:
    """The number of calls to keep for passes that run graphs again."""
    return -(-max((ask(step, "wants_samples") for step in passes), default=0) // RUN_SAMPLES)


def some_samples(captured: CapturedGraph, leaves: Sequence[Any], most: int) -> tuple[list[Any], Tensor | None]:
    """Copies of the leaves of a call with at most ``most`` of its samples, and the indices of these samples.

    The indices are None if the call has no batch.
    """
    batch = captured.call.batch_size(leaves)
    chosen = _spread(batch, most) if batch > 0 else None

    def take(leaf: Any, spec: Any) -> Any:
        if isinstance(leaf, Tensor) and isinstance(spec, TensorSpec) and BATCH in spec.shape and chosen is not None:
            return kept(_selected(leaf, spec, chosen))
        return kept(leaf.clone()) if isinstance(leaf, Tensor) else leaf

    return [take(leaf, spec) for leaf, spec in zip(leaves, captured.call.leaves, strict=True)], chosen


def some_inputs(spec: CallSpec, inputs: Sequence[Tensor], most: int) -> list[Tensor]:
    """The inputs of a graph with at most ``most`` samples, spread over the batch. Fixed batches stay whole."""
    pairs = [(tensor, leaf) for tensor, (_, leaf) in zip(inputs, spec.tensors, strict=True)]
    batch = next((tensor.shape[leaf.shape.index(BATCH)] for tensor, leaf in pairs if BATCH in leaf.shape), 0)
    if batch <= most:
        return list(inputs)
    chosen = _spread(batch, most)
    return [_selected(tensor, leaf, chosen) if BATCH in leaf.shape else tensor for tensor, leaf in pairs]


def _spread(batch: int, most: int) -> Tensor:
    """Indices of at most ``most`` samples, spread over a batch."""
    return torch.linspace(0, batch - 1, min(batch, most), dtype=torch.float32).long()


def _selected(tensor: Tensor, spec: TensorSpec, chosen: Tensor) -> Tensor:
    return tensor.index_select(spec.shape.index(BATCH), chosen.to(tensor.device))
