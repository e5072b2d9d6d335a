"""The input of the walk (requests and seeds), and its result (edits, grants and the solution that holds both)."""

from __future__ import annotations

import enum
import functools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from fxquant.channels.rules import ROTATIONS, RULES, SHIFTS, STATIC_SHIFTS, Rule, shape_of
from fxquant.channels.wants import IDENTITY, Cost, End, Indices, Want
from fxquant.ir.time_tables import TimeTable


class Request(enum.Enum):
    """What a value x should yield instead."""

    FACTOR = "factor"
    """``a * x`` per channel."""
    SHIFT = "shift"
    """``x + c`` per channel, where c depends on the timestep of each sample."""
    STATIC_SHIFT = "static shift"
    """``x + c`` per channel, where c does not depend on the timestep."""
    ROTATION = "rotation"
    """``x M`` with M orthogonal, which mixes channels within blocks."""

    @property
    def rules(self) -> Mapping[Any, Rule]:
        """The rules by which the request moves through each op."""
        tables = {Request.FACTOR: RULES, Request.SHIFT: SHIFTS, Request.ROTATION: ROTATIONS}
        return tables.get(self, {**SHIFTS, **STATIC_SHIFTS})


@dataclass(frozen=True)
class Seed:
    """A value to multiply or shift per channel, and those of its readers that undo the change.

    Attributes:
        name: Stable name: the name of the first linear that reads the value.
        value: The value.
        readers: The nodes that read ``a * value`` or ``value + c`` and undo it.
        axis: The channel axis of the value.
        alike: Seeds with equal ``alike``, other than None, are known to have the same factors.
        blocked: Why the value has to stay unchanged, or None.
        block: Channels per block of a rotation; 0 for other requests.
    """

    name: str
    value: fx.Node
    readers: tuple[fx.Node, ...]
    axis: int = -1
    alike: Hashable = None
    blocked: str | None = None
    block: int = 0

    @property
    def channels(self) -> int:
        """Number of channels."""
        return int(shape_of(self.value)[self.axis])


@dataclass(frozen=True, eq=False)
class Edit:
    """One thing to rewrite: a fold into parameters, or an op inserted between a value and some readers.

    Attributes:
        node: The node whose value is to be scaled or shifted.
        want: The variables of the factors or shifts.
        cost: What the edit costs at run time.
        end: How to fold the edit into parameters; None to multiply or add at run time.
        readers: The users of the node that must read the changed value.
        run_time_op: The op that is inserted if ``end`` is None.
    """

    node: fx.Node
    want: Want
    cost: Cost
    end: End | None
    readers: tuple[fx.Node, ...] = ()
    run_time_op: str = "multiplication"

    @property
    def into(self) -> str:
        """What absorbs the factor, in words."""
        return self.end.into if self.end else f"a {self.run_time_op} after {self.node.name}"


@dataclass(frozen=True)
class Grant:
    """What the walk found for one seed.

    Attributes:
        seed: The seed.
        classes: For each channel, the class of channels that must share its factor; 0 if the factor has to stay 1.
        cost: Cost of the most expensive edit that the seed needs; ``NOT`` if no channel can be scaled.
        into: What absorbs the factors.
        reason: Why some or all channels cannot be scaled, or None.
    """

    seed: Seed
    classes: Indices
    cost: Cost
    into: tuple[str, ...]
    reason: str | None

    @property
    def granted(self) -> npt.NDArray[np.bool_]:
        """Which channels may be scaled."""
        return self.classes > IDENTITY


@dataclass(frozen=True)
class Solution:
    """Grants for all seeds, and the edits that carry them out.

    Attributes:
        grants: By name of the seed.
        edits: What to rewrite.
        mixed: By reader, the want on each value that an attention or a matrix product mixes.
        marked: The want on each value that changes and that a module receives or returns (:mod:`fxquant.ir.borders`).
    """

    grants: Mapping[str, Grant]
    edits: Sequence[Edit]
    mixed: Mapping[fx.Node, Want]
    _class_of: Indices
    _base: Mapping[str, int]
    marked: Mapping[fx.Node, Want] = field(default_factory=dict)

    @property
    def classes(self) -> int:
        """Number of classes of channels, including the class of the identity."""
        return int(self._class_of.max()) + 1

    def groups(self) -> list[list[str]]:
        """Names of seeds that have to be decided together, because some of their channels share a factor."""
        graph: nx.Graph[str] = nx.Graph()
        graph.add_nodes_from(self.grants)
        names = list(self.grants)
        owner = np.full(self.classes, -1)
        for position, (name, grant) in enumerate(self.grants.items()):
            numbers = grant.classes[grant.granted]
            owners = owner[numbers]
            graph.add_edges_from((names[first], name) for first in np.unique(owners[owners >= 0]))
            owner[numbers[owners < 0]] = position
        order = {name: position for position, name in enumerate(self.grants)}
        return [sorted(group, key=order.__getitem__) for group in nx.connected_components(graph)]

    def classes_of(self, want: Want) -> Indices:
        """Class of each variable of a want, in the layout of the want; for a number, an array without axes."""
        return np.asarray(self._class_of[want.scale])

    def factors(self, chosen: Mapping[str, Tensor]) -> Iterator[tuple[Edit, Tensor]]:
        """Each edit with its factor a, float64 in the layout of its want.

        Args:
            chosen: For each seed, its factor per channel, float64 ``[channels]``; equal within each class.
        """
        table = self._factors(chosen)
        for edit in self.edits:
            yield edit, table[torch.from_numpy(self.classes_of(edit.want))]

    def mixed_factors(self, chosen: Mapping[str, Tensor]) -> Iterator[tuple[fx.Node, Tensor, Tensor]]:
        """For each reader of a mixed value v that becomes ``a * v + c``: a and c, in the layout of its want."""
        table = self._factors(chosen)
        for reader, want in self.mixed.items():
            a = table[torch.from_numpy(self.classes_of(want))]
            yield reader, a, (a - 1) * torch.from_numpy(want.offset.copy())

    def marked_factors(self, chosen: Mapping[str, Tensor]) -> Iterator[tuple[fx.Node, Tensor, Tensor]]:
        """Each marked value v that becomes ``a * v + c``: a and c, in the layout of its want."""
        table = self._factors(chosen)
        for node, want in self.marked.items():
            a = table[torch.from_numpy(self.classes_of(want))]
            yield node, a, (a - 1) * torch.from_numpy(want.offset.copy())

    def _factors(self, chosen: Mapping[str, Tensor]) -> Tensor:
        """The factor of each class."""
        table = torch.ones(self.classes, dtype=torch.float64)
        for name, factor in chosen.items():
            table[torch.from_numpy(self.grants[name].classes)] = factor.to(torch.float64)
        table[IDENTITY] = 1.0
        return table

    def shifts(self, chosen: Mapping[str, TimeTable]) -> Iterator[tuple[Edit, TimeTable]]:
        """Each edit with its shifts, a table of rows ``[bins, ...]`` in the layout of its want.

        Args:
            chosen: For each seed, its shift per bin and channel, rows float64 ``[bins, channels]``; equal within each
                class.
        """
        tables = self._tables([edit.want for edit in self.edits], chosen)
        yield from ((edit, table) for edit, table in zip(self.edits, tables, strict=True) if table is not None)

    def mixed_shifts(self, chosen: Mapping[str, TimeTable]) -> Iterator[tuple[fx.Node, TimeTable]]:
        """Each reader of a mixed value with the shifts that the value gets; see :meth:`shifts`."""
        tables = self._tables(list(self.mixed.values()), chosen)
        yield from ((node, table) for node, table in zip(self.mixed, tables, strict=True) if table is not None)

    def marked_shifts(self, chosen: Mapping[str, TimeTable]) -> Iterator[tuple[fx.Node, TimeTable]]:
        """Each marked value with the shifts that it gets; see :meth:`shifts`."""
        tables = self._tables(list(self.marked.values()), chosen)
        yield from ((node, table) for node, table in zip(self.marked, tables, strict=True) if table is not None)

    def _tables(self, wants: Sequence[Want], chosen: Mapping[str, TimeTable]) -> Iterator[TimeTable | None]:
        """The shifts of each want; None if it has none."""
        names = list(chosen)
        owner, place = (np.full(self.classes, -1) for _ in range(2))  # For each class, a seed and one of its channels.
        for position, name in reversed(list(enumerate(names))):
            classes = self.grants[name].classes
            owner[classes], place[classes] = position, np.arange(len(classes))
        owner[IDENTITY] = -1
        for want in wants:
            classes = self.classes_of(want)
            parts = []
            for position in np.unique(owner[classes][owner[classes] >= 0]):
                table = chosen[names[position]]
                mine = torch.from_numpy(owner[classes] == position)
                rows = table.rows[:, torch.from_numpy(np.where(mine, place[classes], 0))]
                parts.append(table.map(lambda _, rows=rows, mine=mine: torch.where(mine, rows, 0.0)))  # type: ignore[misc]
            yield functools.reduce(TimeTable.plus, parts) if parts else None
