"""Digests of what a graph computes: its ops and constants, the names of its inputs and tensors, and their values."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import fx, nn

from fxquant.disk.finished_work import digest_of_tensors
from fxquant.ir.tensors import read_tensors


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


def digest_of_code(module: nn.Module) -> str:
    """SHA-256 of the operations of a graph and of graphs within it, and of their arguments, without tensors."""
    parts = [graph_digest(part.graph) for part in module.modules() if isinstance(part, fx.GraphModule)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def digest_of_graph(module: fx.GraphModule) -> str:
    """SHA-256 of the operations of a graph, of their arguments, and of all values of its tensors.

    Two models whose weights are equal may differ in the operations: in the kind of an activation, or in the epsilon of
    a norm.
    """
    return digest_of_tensors(dict(sorted(read_tensors(module).items())), digest_of_code(module))


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
