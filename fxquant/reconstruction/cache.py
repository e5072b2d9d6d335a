"""The values that calibration calls bring to a segment, and minibatches of these values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import SymInt, Tensor, fx

from fxquant.ir.tensors import size_for

Values = dict[fx.Node, Any]
"""Values of a graph by node: tensors, sizes, or tuples of tensors."""

Picked = list[tuple[int, Tensor]]
"""Samples of a minibatch: for each of its calls the number of the call, and places of samples in it."""

_PARTS = 4  # Calls that a minibatch is mixed from.


def share_alike(chunks: Sequence[Values], nodes: Sequence[fx.Node]) -> None:
    """Let calls hold one tensor for values that are the same in several of them, such as position embeddings."""
    for node in nodes:
        first = chunks[0][node]
        for chunk in chunks[1:]:
            if isinstance(first, Tensor) and first.shape == chunk[node].shape and torch.equal(first, chunk[node]):
                chunk[node] = first


def mixable(chunks: Sequence[Values], nodes: Sequence[fx.Node]) -> bool:
    """Whether rows of different calls can be put in one batch.

    They can if each value has the samples along one axis, or is the same for all calls.
    """
    return all(_axis(node) is not None or _same(chunks, node) for node in nodes)


def minibatch(
    chunks: Sequence[Values],
    nodes: Sequence[fx.Node],
    rows: Sequence[Tensor],
    mixed: bool,
    generator: torch.Generator,
    size: int,
) -> tuple[Values, Tensor]:
    """Values of a random minibatch.

    Args:
        chunks: Values by call.
        nodes: The nodes whose values are wanted.
        rows: One value per sample by call, ``[n]`` each; the values of the chosen samples are returned.
        mixed: The result of :func:`mixable`; if False, a minibatch is one whole call.
        generator: Random generator that picks the samples.
        size: Number of samples wanted.
    """
    if not mixed:
        number = int(torch.randint(len(chunks), (), generator=generator))
        return {node: chunks[number][node] for node in nodes}, rows[number]
    return taken(chunks, nodes, rows, pick(rows, generator, size))


def pick(rows: Sequence[Tensor], generator: torch.Generator, size: int) -> Picked:
    """Samples of a random minibatch that is mixed from several calls; the arguments are those of :func:`minibatch`."""
    parts = min(_PARTS, len(rows))
    numbers = torch.randperm(len(rows), generator=generator)[:parts].tolist()
    return [(n, torch.randperm(len(rows[n]), generator=generator)[: max(1, size // parts)]) for n in numbers]


def part_of(picked: Picked, part: range) -> Picked:
    """The samples of a minibatch at some of its places."""
    found, first = [], 0
    for number, index in picked:
        own = index[max(0, part.start - first) : max(0, part.stop - first)]
        first += len(index)
        if len(own):
            found.append((number, own))
    return found


def taken(
    chunks: Sequence[Values], nodes: Sequence[fx.Node], rows: Sequence[Tensor], picked: Picked
) -> tuple[Values, Tensor]:
    """The values of picked samples, at least one, whose calls can be mixed, as :func:`minibatch` returns them."""
    chosen = torch.cat([rows[n][index] for n, index in picked])
    values: Values = {}
    for node in nodes:
        axis = _axis(node)
        if axis is None:
            values[node] = _at(node, chunks[0][node], len(chosen))
        else:
            parts = [chunks[n][node].index_select(axis, index.to(chunks[n][node].device)) for n, index in picked]
            values[node] = torch.cat(parts, dim=axis)
    return values, chosen


def _axis(node: fx.Node) -> int | None:
    """The axis of a value that its samples are along; None if there is none, or if it is folded with another axis."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    sizes: list[Any] = [*value.shape]
    axes = [axis for axis, size in enumerate(sizes) if isinstance(size, SymInt)]
    return axes[0] if len(axes) == 1 and sizes[axes[0]].node.expr.is_symbol else None


def _same(chunks: Sequence[Values], node: fx.Node) -> bool:
    value = node.meta.get("val")
    if isinstance(value, SymInt):
        return True
    if isinstance(value, Tensor) and not all(type(size) is int for size in value.shape):
        return False
    return all(chunk[node] is chunks[0][node] or _equal(chunk[node], chunks[0][node]) for chunk in chunks[1:])


def _equal(left: Any, right: Any) -> bool:
    return isinstance(left, (int, float)) and type(left) is type(right) and left == right


def _at(node: fx.Node, value: Any, samples: int) -> Any:
    """A value that does not hold samples; a size that counts the samples is computed for this number of them."""
    recorded = node.meta.get("val")
    return size_for(recorded, samples) if isinstance(recorded, SymInt) else value


def drop_unused(values: Values, needed: Mapping[fx.Node, int], number: int) -> None:
    """Free values that no segment from ``number`` on reads; ``needed`` has the last segment that reads each value."""
    for node in [node for node in values if needed.get(node, -1) < number]:
        del values[node]
