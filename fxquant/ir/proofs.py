"""Proofs that an op yields the recorded shape and dtype, so that no op runs twice on the same fake tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.sym_node import SymNode

_PROVEN = "fxquant_proven"  # Key of ``node.meta``: the latest proof of the node's value.
_PLAIN = (int, float, str, torch.device)


@contextmanager
def inferring(mode: FakeTensorMode) -> Iterator[None]:
    """Within this context, ops on fake values of a graph give the shapes and dtypes of their results.

    Without the dispatcher in Python, ops that broadcast an open size, such as addcmul, fail if torch does not have
    their result in its cache.
    """
    with mode, torch.no_grad(), enable_python_dispatcher():
        yield


def prove(node: fx.Node) -> None:
    """Record that the op of ``node``, run on the fake values of its inputs, gave a value like the recorded one."""
    node.meta[_PROVEN] = _Proof(node)


def prove_trace(graph: fx.Graph) -> None:
    """Record it for the ops of a graph that was just traced: the trace ran each one on the recorded values.

    That holds if no op writes into a value. What later changes a node undoes its proof.

    Ops whose result has another dtype than all of their inputs are left out, because that may be due to where the
    model's code ran them: under another default dtype, under autocast, or before it gave the result other ``.data``.
    """
    for node in graph.nodes:
        if node.op == "call_function" and all("val" in each.meta for each in (node, *node.all_input_nodes)):
            read = {dtype for each in node.all_input_nodes for dtype in _dtypes(each.meta["val"])}
            if _dtypes(node.meta["val"]) <= read:
                prove(node)


def _dtypes(value: Any) -> set[torch.dtype]:
    """The dtypes of a value, or of the tensors in a list."""
    if isinstance(value, (tuple, list)):
        return {dtype for item in value for dtype in _dtypes(item)}
    return {value.dtype} if isinstance(value, Tensor) else set()


def is_proven(node: fx.Node) -> bool:
    """Whether op, inputs and value of ``node`` are those of its latest proof."""
    return _Proof(node).same_as(node.meta.get(_PROVEN))


class _Proof:
    """Proof that an op yields a value from its inputs. It is valid as long as op, inputs and value are the same.

    Fake tensors have no values, so inputs may be other ones with the same sizes, strides and dtype: folding a factor
    into a weight, or making an input anew, does not undo the proof.

    A proof holds the inputs and the value from the metadata, not nodes, so it stays valid in a copy of the graph. It
    also holds sizes, because an op that works in place may change the sizes of a value that stays the same object.
    """

    __slots__ = ("leaves", "target")

    def __init__(self, node: fx.Node) -> None:
        self.target = node.target
        self.leaves: list[Any] = []
        self._take((node.args, node.kwargs, node.meta.get("val")))

    def _take(self, value: Any) -> None:
        # Most often called with nodes and numbers; whether something is a mapping takes longest to find out.
        if isinstance(value, fx.Node):
            value = value.meta["val"]
        if isinstance(value, Tensor):
            self.leaves += (value, value.dtype)
            # Symbolic sizes are kept as their nodes, see _size.
            self.leaves += [size if isinstance(size, int) else size.node for size in value.shape]
        elif isinstance(value, (tuple, list)):
            self.leaves.append(len(value))
            for item in value:
                self._take(item)
        elif value is not None and not isinstance(value, _PLAIN) and isinstance(value, Mapping):
            self._take([*value, *value.values()])
        else:
            self.leaves.append(value)

    def same_as(self, other: _Proof | None) -> bool:
        """Whether there is another proof, and it is of the same facts."""
        return (
            other is not None
            and self.target is other.target
            and len(self.leaves) == len(other.leaves)
            and all(map(_same, self.leaves, other.leaves))
        )


def _same(mine: Any, theirs: Any) -> bool:
    if mine is theirs:
        return True
    if type(mine) is not type(theirs):
        return isinstance(mine, FakeTensor) and isinstance(theirs, FakeTensor) and _are_alike(mine, theirs)
    if isinstance(mine, FakeTensor):
        return _are_alike(mine, theirs)
    if isinstance(mine, SymNode):
        return _size(mine) == _size(theirs)
    return isinstance(mine, _PLAIN) and bool(mine == theirs)


def _are_alike(left: FakeTensor, right: FakeTensor) -> bool:
    """Whether an op cannot tell two fake tensors apart."""
    return (
        left.fake_mode is right.fake_mode
        and left.constant is None is right.constant
        and left.layout == right.layout == torch.strided
        and _facts(left) == _facts(right)
    )


def _facts(value: FakeTensor) -> tuple[Any, ...]:
    flags = value.requires_grad, value.is_conj(), value.is_neg()
    sizes = *value.shape, *value.stride(), value.storage_offset()
    numbers = [size if isinstance(size, int) else _size(size.node) for size in sizes]
    return value.dtype, value.device, value.dim(), *numbers, *flags


def _size(node: SymNode) -> tuple[int, Any]:
    """A symbolic size as its formula. Comparing the sizes as numbers would fix the open batch size."""
    return id(node.shape_env), node.expr
