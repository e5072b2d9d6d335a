"""Positions of the samples in the values that a shift passes.

A shift that depends on the timestep is selected per sample and added along the leading axis. Between a linear's input
and the op that absorbs the shift, samples may change places, or another axis of the same size may come first. So the
number of each sample is propagated as a separate want, through the same rules.
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


class SampleOrder:
    """The places of the samples in the values that a walk has reached so far.

    Args:
        timestep: The input that holds the timestep; None if nothing depends on it.
        rules: How requests move through each op.
    """

    def __init__(self, timestep: fx.Node | None, rules: Mapping[Any, Rule]) -> None:
        self._timestep, self._rules = timestep, rules
        self._places: dict[fx.Node, Want | None] = {}  # None if the places are not known any more.
        shape = [] if timestep is None else list(timestep.meta["val"].shape)
        size = shape[0] if len(shape) == 1 else 1
        self._open = not isinstance(size, int)
        self._count = 2 if self._open else size

    def start(self, value: fx.Node) -> None:
        """Record that the samples are along the leading axis of this value, to which a shift is added."""
        if self._timestep is not None and self._count > 1 and shape_of(value):
            fits = unfit(self._timestep, value.meta["val"]) is None  # Tokens may lead, if a call holds one sample.
            self._note(value, self._in_front(value) if fits else None)

    def follow(self, node: fx.Node, sources: Iterable[fx.Node]) -> None:
        """Move the places from a node's value to these sources, to which a request on the value moves."""
        if node not in self._places:
            return
        places = self._places[node]
        # At unread positions the sample does not matter, for example in the text part of a joint attention.
        found = None if places is None else outcome(node, spread_over_unread(places), self._rules)
        if self._open and isinstance(found, Barrier) and self._rules[node.target] is reshape:
            return  # No axis has the size of an open batch that was folded into another axis: unfit() checks shapes.
        ways = found.ways if isinstance(found, Choose) else [found] if isinstance(found, Push) else []
        pushed = {source: want for way in ways for source, want in way.inputs}
        for source in sources:
            self._note(source, pushed.get(source))

    def unfit(self, node: fx.Node) -> str | None:
        """Why the value of a node cannot get a shift per sample, or None if it can."""
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
    """Both wants in one, if they agree at the positions that both read; else None."""
    shape = common_shape(left.scale.shape, right.scale.shape)
    one, two = (repeated(want.scale, shape) for want in (left, right))
    if ((one != two) & (one != UNREAD) & (two != UNREAD)).any():
        return None
    return Want.of(np.where(one == UNREAD, two, one))
