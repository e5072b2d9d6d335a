"""Divisions of a value between ranks, along one axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx


@dataclass(frozen=True)
class Division:
    """How a value is divided between ranks: along one axis, run by run.

    Each rank holds its share of every run, one after another. So the result of a concatenation is divided like its
    parts.

    Attributes:
        axis: The axis, from 0.
        runs: Sizes of the runs in the whole value. The number of ranks divides each.
    """

    axis: int
    runs: tuple[int, ...]

    @property
    def whole(self) -> int:
        """Size of the whole value along the axis."""
        return sum(self.runs)

    def at(self, axis: int) -> Division:
        """The same runs along another axis."""
        return Division(axis, self.runs)

    def scaled(self, up: int, down: int = 1) -> Division:
        """The division of as many groups as there are channels, or of the channels of groups.

        Raises:
            Refused: If a run would not be a whole number.
        """
        if any(run * up % down for run in self.runs):
            raise Refused(f"the runs {list(self.runs)} are not whole numbers of {down // up or 1} channels")
        return Division(self.axis, tuple(run * up // down for run in self.runs))


class Refused(Exception):
    """A value cannot be divided in this way; the text says why."""


class Refine(Exception):
    """A value can be divided if its runs are finer.

    Attributes:
        runs: The runs that it needs.
    """

    def __init__(self, runs: tuple[int, ...]) -> None:
        super().__init__(str(runs))
        self.runs = runs


def shape_of(node: fx.Node) -> Sequence[Any]:
    """The shape of a node's value in the whole graph; symbolic along an open batch."""
    return tuple(node.meta["val"].shape)
