"""A digest of what a graph computes, for results of calls that are kept in files."""

from __future__ import annotations

import hashlib

from torch import fx, nn

from fxquant.disk.finished_work import digest_of_tensor
from fxquant.ir.tensors import get_tensor


def digest_of_code(module: nn.Module) -> str:
    """SHA-256 of the operations of a graph and of their arguments, without the values of tensors."""
    parts = [part.code for part in module.modules() if isinstance(part, fx.GraphModule)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def digest_of_graph(module: fx.GraphModule) -> str:
    """SHA-256 of the operations of a graph, of their arguments, and of all values of its tensors.

    Two models whose weights are equal may differ in the operations: in the kind of an activation, or in the epsilon of
    a norm.
    """
    found = hashlib.sha256(digest_of_code(module).encode())
    for name in sorted({str(node.target) for node in module.graph.nodes if node.op == "get_attr"}):
        found.update(f"{name}{digest_of_tensor(get_tensor(module, name))}".encode())
    return found.hexdigest()
