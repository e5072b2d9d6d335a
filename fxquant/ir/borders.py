"""The values of a graph that modules of the model receive and return.

A graph has no modules. Caches of denoising steps skip modules, so they need to know which value of the graph is the
result of which module. Tracing marks these values (:mod:`fxquant.capture.borders`), and the marks stay while passes and
backends rewrite the graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, fx

from fxquant.ir.histories import digest
from fxquant.ir.meta import BORDER_CHANGES, BORDERS

if TYPE_CHECKING:
    from fxquant.ir.layer_changes import OutputTurn


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


@dataclass(frozen=True)
class Change:
    """How a pass changed a marked value, per channel.

    Attributes:
        values: Digest of the factors, the shifts or the rotation.
        shifts: Whether something is added to the value; if not, it is only multiplied.
        moves: Whether what is added depends on the timestep.
    """

    values: str
    shifts: bool = False
    moves: bool = False


def is_marked(node: fx.Node) -> bool:
    """Whether a module receives or returns the value of a node."""
    return BORDERS in node.meta


def note_factors(node: fx.Node, factor: Tensor, shift: Tensor) -> None:
    """Note that a marked value became ``factor * value + shift``, both float64, per channel or for all."""
    if (factor != 1).any() or (shift != 0).any():
        _note(node, Change(digest("factors", factor.flatten(), shift.flatten()), shifts=bool((shift != 0).any())))


def note_shifts(node: fx.Node, rows: Tensor) -> None:
    """Note that a table of shifts, float64 ``[bins, ...]``, is added to a marked value."""
    if (rows != 0).any():
        moves = bool((rows != rows[:1]).any())
        _note(node, Change(digest("shifts", rows.flatten(1)), shifts=True, moves=moves))


def note_rotation(node: fx.Node, turn: OutputTurn) -> None:
    """Note that the channels of a marked value are rotated within blocks."""
    _note(node, Change(digest("rotation", turn.places, turn.signs)))


def changes_of(node: fx.Node) -> tuple[Change, ...]:
    """What passes did to a marked value, the earliest first."""
    return tuple(node.meta.get(BORDER_CHANGES, ()))


def _note(node: fx.Node, change: Change) -> None:
    node.meta[BORDER_CHANGES] = (*changes_of(node), change)


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
            if changes := node.meta.pop(BORDER_CHANGES, ()):
                new.meta[BORDER_CHANGES] = changes


def _looks(value: Tensor) -> tuple[object, ...]:
    return value.dtype, *(str(size) for size in value.shape)
