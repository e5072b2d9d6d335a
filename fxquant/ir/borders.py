"""The values of a graph that modules of the model receive and return.

A graph has no modules. Caches of denoising steps skip modules, so they need to know which value of the graph is the
result of which module. Tracing marks these values (:mod:`fxquant.capture.borders`), and the marks stay while passes and
backends rewrite the graph.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, fx

from fxquant.ir.meta import BORDERS


class Border(NamedTuple):
    """A value that a module receives or returns.

    Attributes:
        module: Path of the module.
        argument: Name of the argument that it receives the value as; None for a value that it returns.
        position: Position of the value among those that it returns; 0 for an argument.
    """

    module: str
    argument: str | None
    position: int


def borders(graph: fx.Graph) -> dict[Border, list[fx.Node]]:
    """The nodes of the values that modules receive and return; several if a module is called several times."""
    found: dict[Border, list[fx.Node]] = {}
    for node in graph.nodes:
        for border in node.meta.get(BORDERS, ()):
            found.setdefault(border, []).append(node)
    return found


def hand_over(node: fx.Node, new: fx.Node) -> None:
    """Move the marks of a value to the value that replaces it, if both have the same shape and dtype."""
    if BORDERS in node.meta and new is not node:
        of, value = node.meta.get("val"), new.meta.get("val")
        if isinstance(of, Tensor) and isinstance(value, Tensor) and _looks(of) == _looks(value):
            new.meta[BORDERS] = (*new.meta.get(BORDERS, ()), *node.meta.pop(BORDERS))


def _looks(value: Tensor) -> tuple[object, ...]:
    return value.dtype, *(str(size) for size in value.shape)
