"""Which nodes a value goes into, and where it comes from."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import fx

from fxquant.ir.names import base_name


def reached(graph: fx.Graph, is_start: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """The start nodes, and the nodes that depend on more of them than their sizes."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        reads = not base_name(node.target).startswith("sym_") and not found.isdisjoint(node.all_input_nodes)
        if reads or is_start(node):
            found.add(node)
    return found


def behind(value: Any, names: Collection[str]) -> Any:
    """The source of a value, behind ops of these names (:func:`~fxquant.ir.names.base_name`), by first arguments."""
    while isinstance(value, fx.Node) and base_name(value.target) in names:
        value = value.args[0]
    return value
