"""Names of ops, in three spellings: ``aten::add.Tensor``, ``add.Tensor`` and ``add``."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import fx


def qualified_name(target: Any) -> str:
    """Name of an op with its namespace and overload, such as ``aten::add.Tensor``; of a function, such as ``getitem``.

    Args:
        target: ``node.target`` of a ``call_function`` node.
    """
    return str(getattr(target, "_name", None) or getattr(target, "__name__", target))


def op_name(target: Any) -> str:
    """Name of an op with its overload, such as ``add.Tensor``. Ops outside of ATen keep their namespace."""
    return qualified_name(target).removeprefix("aten::")


def base_name(target: Any) -> str:
    """Name of an op without its overload, such as ``add``. Ops outside of ATen keep their namespace.

    Empty for the name that is the target of an input or a parameter: an input may be called ``view``.
    """
    return "" if isinstance(target, str) else op_name(target).partition(".")[0]


def count_ops(graph: fx.Graph) -> Counter[str]:
    """Number of nodes by op name, without parameters and inputs."""
    return Counter(qualified_name(node.target) for node in graph.nodes if node.op == "call_function")
