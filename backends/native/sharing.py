"""What a model computes several times is computed once: every block of a DiT embeds the timestep anew."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxquant.ir.rewriter import Rewriter


def share(graph: fx.Graph, rewriter: Rewriter) -> None:
    """Replace calls of one op on the same values by the first of them. Random and mutating ops stay."""
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
    """Equal for equal arguments; 1, 1.0 and True are not equal, as they promote dtypes differently."""
    if isinstance(value, fx.Node):
        return value
    if isinstance(value, dict):
        return tuple((name, _key(part)) for name, part in value.items())
    if isinstance(value, (list, tuple)):
        return type(value).__name__, tuple(map(_key, value))
    if isinstance(value, slice):
        return "slice", _key((value.start, value.stop, value.step))
    return type(value), repr(value)
