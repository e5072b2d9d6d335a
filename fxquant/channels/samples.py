"""Where the samples are in the values that a shift passes on its way.

A shift that depends on the timestep is picked for each sample, and is added along the leading axis. On the way from a
linear's input to what absorbs the shift samples may change places, or another axis of the same size may come in front.
So the number of each sample goes along as a want of its own, through the same rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import fx

from fxquant.channels.layouts import common_shape, repeated, spread_over_unread
from fxquant.channels.rules import Rule, outcome, shape_of
from fxquant.channels.rules.layout import reshape
from fxquant.channels.wants import IDENTITY, UNREAD, Barrier, Choose, Push, Want
from fxquant.ir.time_tables import unfit


class Samples:
    """The places of the samples in values, as far as a walk has come.

    Args:
        timestep: The input that holds the timestep; None where nothing depends on it.
        rules: How requests move through each op.
    """

    def __init__(self, timestep: fx.Node | None, rules: Mapping[Any, Rule]) -> None:
        self._timestep, self._rules = timestep, rules
        self._places: dict[fx.Node, Want | None] = {}  # None where they are lost.
        shape = [] if timestep is None else list(timestep.meta["val"].shape)
        size = shape[0] if len(shape) == 1 else 1
        self._open = not isinstance(size, int)
        self._count = 2 if self._open else size

    def start(self, value: fx.Node) -> None:
        """Samples are along the leading axis of this value, to whose elements a shift is added."""
        if self._count > 1 and shape_of(value):
            self._note(value, self._in_front(value))

    def follow(self, node: fx.Node, sources: Iterable[fx.Node]) -> None:
        """A request on a node's value goes on to these sources."""
        if node not in self._places:
            return
        places = self._places[node]
        # Nobody cares which sample is where nothing is read, as in the text's part of a joint attention.
        found = None if places is None else outcome(node, spread_over_unread(places), self._rules)
        if self._open and isinstance(found, Barrier) and self._rules[node.target] is reshape:
            return  # What an open batch is folded into has no axis of its size: shapes tell.
        ways = found.ways if isinstance(found, Choose) else [found] if isinstance(found, Push) else []
        pushed = {source: want for way in ways for source, want in way.inputs}
        for source in sources:
            self._note(source, pushed.get(source))

    def unfit(self, node: fx.Node) -> str | None:
        """Why the value of a node cannot get a shift for each sample, or None."""
        if self._timestep is None:
            return None
        if (reason := unfit(self._timestep, node.meta["val"])) is not None:
            return reason
        if node not in self._places:
            return None
        places = self._places[node]
        if places is not None and _agreed(places, self._in_front(node)) is not None:
            return None
        return f"the samples are not in order along the leading axis of {node.name}"

    def _in_front(self, node: fx.Node) -> Want:
        shape = (self._count, *[1] * (len(shape_of(node)) - 1))
        return Want.of(IDENTITY + 1 + np.arange(self._count, dtype=np.int64).reshape(shape))

    def _note(self, value: fx.Node, places: Want | None) -> None:
        if value in self._places and places is not None:
            before = self._places[value]
            places = None if before is None else _agreed(before, places)
        self._places[value] = places


def _agreed(left: Want, right: Want) -> Want | None:
    """Both, if they say the same of what both read."""
    shape = common_shape(left.scale.shape, right.scale.shape)
    one, two = (repeated(want.scale, shape) for want in (left, right))
    if ((one != two) & (one != UNREAD) & (two != UNREAD)).any():
        return None
    return Want.of(np.where(one == UNREAD, two, one))
