"""A digest of what a graph computes: its ops and constants, and the names of its inputs and tensors."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import fx


def graph_digest(graph: fx.Graph, layouts: bool = True) -> str:
    """Digest of a graph, the same for graphs that call the same ops on the same values with the same constants.

    The digest does not depend on the names or the order of nodes, on nodes that no output depends on, on devices, or on
    the values of tensors.

    Args:
        graph: The graph.
        layouts: Whether copies of a tensor into another layout count. The trace of an attention has such a copy where
            the kernel of its device returns another layout, so a digest for all devices leaves them out.
    """
    known: dict[fx.Node, str] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            text = f"{node.op} {node.target}"
        elif not layouts and node.target is torch.ops.aten.contiguous.default:
            known[node] = known[node.all_input_nodes[0]]
            continue
        else:
            text = f"{_name(node.target)} {_text(node.args, known)} {_text(node.kwargs, known)}"
        known[node] = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return next(known[node] for node in graph.nodes if node.op == "output")


def _name(target: Any) -> str:
    return str(target) if isinstance(target, (str, torch._ops.OpOverload)) else getattr(target, "__name__", str(target))


def _text(value: Any, known: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return known[value]
    if isinstance(value, (list, tuple)):
        return f"[{' '.join(_text(item, known) for item in value)}]"
    if isinstance(value, dict):
        return _text([part for key in sorted(value) for part in (key, value[key])], known)
    return "device" if isinstance(value, torch.device) else repr(value)
