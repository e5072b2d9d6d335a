"""What was done to the tensors of a graph, so that the graphs of a model share those alone that are equal.

A model becomes several graphs, one for each kind of call, and what a pass folds into a weight depends on the graph. So
each tensor has a history: its origin and the folds since. Histories hold digests of factors, never values of weights:
they are the same when a plan is replayed without weights, and equal histories mean equal tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from fxquant.errors import PassError
from fxquant.ir.tensors import get_tensor

_HISTORY = "fxquant_history"
"""Key of ``node.meta`` of a ``get_attr`` node: a :class:`History`, or None where the content of the tensor tells."""


@dataclass(frozen=True)
class History:
    """Where a tensor comes from, and what was folded into it since.

    Attributes:
        root: Name of the model's own tensor that it was, or what it was made from.
        steps: One digest for each fold, in order.
    """

    root: str
    steps: tuple[str, ...] = ()

    def then(self, *by: Tensor | str) -> History:
        """The history after one more fold, by these factors."""
        return History(self.root, (*self.steps, digest(*by)))

    @property
    def digest(self) -> str:
        """One short text for all of it."""
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

    Without a record it is the name of a tensor of the captured model, and the content of a constant that a pass made.

    Raises:
        PassError: If the tensor follows from weights that are not at hand, and no pass recorded how.
    """
    found = node.meta.get(_HISTORY, node.target)
    if isinstance(found, History):
        return found
    if found is not None:
        return History(str(found))
    tensor = get_tensor(module, str(node.target))
    if isinstance(tensor, FakeTensor):
        raise PassError(
            f"tensor {node.target} follows from weights, and the pass that made it did not say from which: name them "
            "as history= of Rewriter.constant"
        )
    return History("constant", (digest(tensor),))


def has_content(node: fx.Node) -> bool:
    """Whether the content of a tensor is its history: it follows from the plan alone, not from weights."""
    return node.meta.get(_HISTORY, node.target) is None


def record(node: fx.Node, history: History | None) -> None:
    """Set the history of the tensor that a ``get_attr`` node reads; None where its content tells."""
    node.meta[_HISTORY] = history


def made_from(kind: str, *sources: History | Tensor | Sequence[str] | str) -> History:
    """The history of a tensor that follows from others: weights by their histories, the rest by content."""
    parts: list[Tensor | str] = []
    for source in sources:
        if isinstance(source, History):
            parts.append(source.digest)
        elif isinstance(source, (Tensor, str)):
            parts.append(source)
        else:
            parts.append(digest(*source))
    return History(kind, (digest(*parts),))
