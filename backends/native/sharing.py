"""Computes repeated values of a model once. For example, every block of a DiT embeds the timestep again."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxquant.ir.rewriter import Rewriter


def share(graph: fx.Graph, rewriter: Rewriter) -> None:
    """Replace repeated calls of an op on the same values by the first call. Random and mutating ops do not change."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or not _is_function(node.target):
            continue
        key = node.target, _key(node.args), _key(node.kwargs)
        first = seen.setdefault(key, node)
        if first is not node:
            rewriter.replace(node, first)


def _is_function(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__name__", "") == "getitem"
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


def _key(value: Any) -> Any:
    """A key that is equal for equal arguments. 1, 1.0 and True differ, because they promote dtypes differently."""
    if isinstance(value, fx.Node):
        return value
    if isinstance(value, dict):
        return tuple((name, _key(part)) for name, part in value.items())
    if isinstance(value, (list, tuple)):
        return type(value).__name__, tuple(map(_key, value))
    if isinstance(value, slice):
        return "slice", _key((value.start, value.stop, value.step))
    return type(value), repr(value)
