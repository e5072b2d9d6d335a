"""Histories of the tensors of a graph, so that the graphs of a model share only equal tensors.

A model becomes several graphs, one per kind of call, and what a pass folds into a weight depends on the graph. So each
tensor has a history: its origin and the folds since then. Histories hold digests of factors, never values of weights.
Therefore histories are the same when a plan is replayed without weights, and equal histories mean equal tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from fxquant.errors import PassError
from fxquant.ir.tensors import get_tensor

_HISTORY = "fxquant_history"
"""Key of ``node.meta`` of a ``get_attr`` node: a :class:`History`, or None if the tensor's content is its history."""


@dataclass(frozen=True)
class History:
    """Where a tensor comes from, and what was folded into it since then.

    Attributes:
        root: Name of the model's own tensor that it was at first; the kind of the tensor if a pass made it.
        steps: One digest per fold, in order. If a pass made the tensor, the first digest is of its content or sources.
    """

    root: str
    steps: tuple[str, ...] = ()

    def then(self, *by: Tensor | str) -> History:
        """The history after one more fold, by these factors."""
        return History(self.root, (*self.steps, digest(*by)))

    @property
    def digest(self) -> str:
        """One short text for the whole history."""
        return digest(self.root, *self.steps)


def digest(*parts: Tensor | str) -> str:
    """A digest of texts, and of the dtypes, shapes and values of tensors: 16 hexadecimal digits."""
    found = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, str):
            found.update(f"text {len(part)} {part}".encode())
        else:
            found.update(f"tensor {part.dtype} {list(part.shape)} ".encode())
            found.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def history_of(module: fx.GraphModule, node: fx.Node) -> History:
    """The history of the tensor that a ``get_attr`` node reads.

    Without a record, the tensor belongs to the captured model, and its history is its name. The history of a constant
    that a pass made is its content.

    Raises:
        PassError: If the tensor is derived from weights that are not available, and no pass recorded how.
    """
    found = node.meta.get(_HISTORY, node.target)
    if isinstance(found, History):
        return found
    if found is not None:
        return History(str(found))
    tensor = get_tensor(module, str(node.target))
    if isinstance(tensor, FakeTensor):
        raise PassError(
            f"tensor {node.target} is derived from weights, and the pass that made it did not record from which ones; "
            "pass them as history= to Rewriter.constant"
        )
    return History("constant", (digest(tensor),))


def has_content(node: fx.Node) -> bool:
    """Whether the content of a tensor is its history: it is derived from the plan alone, not from weights."""
    return node.meta.get(_HISTORY, node.target) is None


def record(node: fx.Node, history: History | None) -> None:
    """Set the history of the tensor that a ``get_attr`` node reads; None if its content is its history."""
    node.meta[_HISTORY] = history


def made_from(kind: str, *sources: History | Tensor | Sequence[str] | str) -> History:
    """The history of a tensor that is derived from others: weights count by history, all else by content."""
    parts: list[Tensor | str] = []
    for source in sources:
        if isinstance(source, History):
            parts.append(source.digest)
        elif isinstance(source, (Tensor, str)):
            parts.append(source)
        else:
            parts.append(digest(*source))
    return History(kind, (digest(*parts),))


def recorded(node: fx.Node) -> bool:
    """Whether a history was recorded for a tensor; else it belongs to the captured model."""
    return _HISTORY in node.meta


def to_json(node: fx.Node) -> list[Any] | None:
    """The recorded history of a tensor as JSON values."""
    found = node.meta[_HISTORY]
    return None if found is None else [found.root, list(found.steps)]


def from_json(data: list[Any] | None) -> History | None:
    """Read what :func:`to_json` returned."""
    return None if data is None else History(str(data[0]), tuple(map(str, data[1])))
