"""Time as data in the graph: a value that depends on the timestep is a row of a table, selected per sample.

``bin = bucketize(timestep, boundaries)`` and ``row = table[bin]`` are ordinary nodes. So one graph serves every
schedule and number of steps, a batch may mix timesteps, and the graph has no branches. A timestep outside of the
calibrated range falls into the first or the last bin.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from fxquant.errors import MissingTimestepError
from fxquant.ir.arguments import args
from fxquant.ir.histories import History, digest, has_content, made_from
from fxquant.ir.places import place_of

if TYPE_CHECKING:
    from fxquant.ir.rewriter import Rewriter

aten = torch.ops.aten

BOUNDARIES = "fxquant_boundaries"
"""Key of ``node.meta`` for the values of a table of boundaries, to find it again."""


@dataclass(frozen=True, eq=False)
class TimeTable:
    """Values that depend on the timestep.

    Attributes:
        timestep: The model's timestep input: 0-d, ``[1]`` or ``[batch]``.
        boundaries: Boundaries between bins, ascending; bin i holds the timesteps that are above exactly i boundaries.
        rows: ``[bins, ...]``, one row more than boundaries; float64 until the rows enter the graph.
        follows: If the rows are derived from weights, a digest of these and of everything else that the rows are
            derived from; otherwise None. See :mod:`fxquant.ir.histories`.
    """

    timestep: fx.Node
    boundaries: tuple[float, ...]
    rows: Tensor
    follows: str | None = None

    @property
    def origin(self) -> str:
        """What distinguishes the table from others: a digest of what it is derived from, or of its values."""
        return digest("table", self.rows, str(self.boundaries)) if self.follows is None else self.follows

    @property
    def history(self) -> History | None:
        """The history of a constant that holds the rows."""
        return None if self.follows is None else made_from("rows", self.follows)

    @property
    def static(self) -> bool:
        """Whether there is one row for all timesteps."""
        return len(self.rows) == 1

    def map(self, function: Callable[[Tensor], Tensor]) -> TimeTable:
        """The same table with other rows."""
        return replace(self, rows=function(self.rows))

    def refined(self, boundaries: Sequence[float]) -> TimeTable:
        """The same table over more boundaries, which include its own."""
        starts = [-float("inf"), *boundaries]
        source = torch.tensor([sum(start >= own for own in self.boundaries) for start in starts])
        follows = None if self.follows is None else digest(self.follows, str(tuple(boundaries)))
        rows = self.rows[source.to(self.rows.device)]
        return replace(self, boundaries=tuple(boundaries), rows=rows, follows=follows)

    def plus(self, other: TimeTable) -> TimeTable:
        """The sum of two tables, over the boundaries of both."""
        if self.boundaries == other.boundaries:
            from_weights = self.follows is not None or other.follows is not None
            follows = digest("sum", self.origin, other.origin) if from_weights else None
            return replace(self, rows=self.rows + other.rows, follows=follows)
        both = sorted({*self.boundaries, *other.boundaries})
        return self.refined(both).plus(other.refined(both))


def boundaries_between(groups: Sequence[Sequence[float]]) -> list[float]:
    """Boundaries halfway between neighbouring groups of timesteps, all ascending."""
    return [(left[-1] + right[0]) / 2 for left, right in pairwise(groups)]


def bin_of(boundaries: Sequence[float], timesteps: Tensor) -> Tensor:
    """Bins of timesteps: int64 of the same shape."""
    return torch.bucketize(timesteps.to(torch.float32), torch.tensor(boundaries, dtype=torch.float32))


def timestep_input(graph: fx.Graph, name: str | None) -> fx.Node:
    """The input that holds the timestep.

    Raises:
        MissingTimestepError: If the graph has no input of that name, or the model has no timestep.
    """
    if name is None:
        raise MissingTimestepError(
            "the model has no timestep, so nothing can depend on it; choose a recipe without group-timesteps, "
            "shift-channels and bin-ranges"
        )
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for node in inputs:
        if node.target == name:
            return node
    raise missing_timestep(name, [str(node.target) for node in inputs])


def missing_timestep(name: str, inputs: Sequence[str]) -> MissingTimestepError:
    """The error for a model that has no tensor input of the name that should hold the timestep."""
    return MissingTimestepError(
        f"the model has no tensor input {name!r} for the timestep. Its inputs are: {', '.join(inputs)}. Name the input "
        'that holds the timestep: fxquant.compile(..., timestep="..."). A model without one, such as a text encoder, '
        "takes timestep=None."
    )


def unfit(timestep: fx.Node, value: Tensor) -> str | None:
    """Why a value cannot get one row per sample, or None if it can."""
    shape = timestep.meta["val"].shape
    if len(shape) > 1:
        sizes = ", ".join(str(size) if isinstance(size, int) else "batch" for size in shape)
        return f"the timestep has shape [{sizes}], not one number a sample"
    if len(shape) == 1 and str(shape[0]) not in ("1", str(value.shape[0])):
        return "the leading axis is not the batch"
    return None


def rows_at(rewriter: Rewriter, table: TimeTable, rank: int, name: str, sources: Sequence[fx.Node]) -> fx.Node:
    """Add nodes that select the row of each sample, shaped to broadcast against a value of this rank, batch first.

    Call this with the insertion point where the rows are needed. Samples are along the first axis of the result.
    """
    shape = [1] * (rank - table.rows.dim()) + list(table.rows.shape[1:])
    if table.static:
        return rewriter.constant(name, table.rows.reshape(1, *shape), sources, table.history)
    held = rewriter.constant(name, table.rows, sources, table.history)
    rows = rewriter.call(aten.index_select.default, (held, 0, _bin(rewriter, table)), sources, name="row")
    return rewriter.call(aten.view.default, (rows, [-1, *shape]), sources, name="rows")


def add_rows(
    rewriter: Rewriter, node: fx.Node, table: TimeTable, sources: Sequence[fx.Node], readers: Sequence[fx.Node]
) -> fx.Node:
    """Make some readers of a value read the value plus its sample's row of a table ``[bins, ...]``; returns the sum."""
    value = node.meta["val"]
    # The bins are computed before the first op, but after all inputs: rows for an input must come after the bins.
    behind = _bin(rewriter, table) if node.op == "placeholder" and not table.static else node
    with rewriter.before(behind.next):
        rows = rows_at(rewriter, table.map(lambda r: r.to(value.dtype)), value.dim(), f"{place_of(node)}.rows", sources)
        total = rewriter.call(aten.add.Tensor, (node, rows), sources, name=f"{node.name}_shifted")
    for reader in readers:
        rewriter.redirect(reader, node, total)
    return total


def reads_rows(node: object) -> bool:
    """Whether a node is one that :func:`rows_at` made for a table of several bins."""
    if not isinstance(node, fx.Node) or node.target is not aten.view.default:
        return False
    picked = args(node).node("self")
    return picked.target is aten.index_select.default and _is_bin(args(picked).index)


def plus_rows(node: fx.Node) -> fx.Node | None:
    """The sum of a linear and its sample's row, ``linear(x, W) + table[bin]``, if nothing else reads the linear."""
    user = next(iter(node.users), None)
    if len(node.users) != 1 or user is None or user.target is not aten.add.Tensor or args(user).alpha != 1:
        return None
    return user if args(user).self is node and reads_rows(args(user).other) else None


def replace_rows(rewriter: Rewriter, total: fx.Node, table: TimeTable) -> None:
    """Make a sum from :func:`add_rows` add the rows of another table."""
    old, value = args(total).node("other"), total.meta["val"]
    with rewriter.before(total):
        name = str(_picked_from(old).target)
        rows = rows_at(rewriter, table.map(lambda r: r.to(value.dtype)), value.dim(), name, [total])
    rewriter.redirect(total, old, rows)


def read_table(node: fx.Node, timestep: fx.Node, rewriter: Rewriter) -> TimeTable | None:
    """The table from which a node selects rows, or a table of one row if it is a constant; None if it is neither."""
    if node.op == "get_attr":
        value = rewriter.tensor(node)
        if value.shape[:1] != (1,):
            return None
        return TimeTable(timestep, (), value.reshape(1, *value.shape[1:]), _followed(node, rewriter))
    if not reads_rows(node):
        return None
    held, bins = _picked_from(node), args(args(node).node("self")).node("index")
    boundaries = rewriter.tensor(args(args(bins).node("self")).boundaries)
    return TimeTable(timestep, tuple(boundaries.tolist()), rewriter.tensor(held), _followed(held, rewriter))


def _picked_from(rows: fx.Node) -> fx.Node:
    """The table of rows that :func:`rows_at` selects."""
    return args(args(rows).node("self")).node("self")


def _followed(held: fx.Node, rewriter: Rewriter) -> str | None:
    return None if has_content(held) else rewriter.history(held).digest


def _is_bin(node: object) -> bool:
    if not isinstance(node, fx.Node) or node.target is not aten.view.default:
        return False
    return args(node).node("self").target is _BUCKETIZE


_BUCKETIZE = aten.bucketize.Tensor


def _bin(rewriter: Rewriter, table: TimeTable) -> fx.Node:
    """The bin of each sample, ``[batch]`` or ``[1]``: one node for all tables with these boundaries."""
    for user in table.timestep.users:
        for found in user.users if user.target is aten.to.dtype else ():
            held = args(found).boundaries if found.target is _BUCKETIZE else None
            if isinstance(held, fx.Node) and held.meta.get(BOUNDARIES) == table.boundaries:
                return next(iter(found.users))
    boundaries = rewriter.constant(
        "timestep_boundaries", torch.tensor(table.boundaries, dtype=torch.float32), [table.timestep]
    )
    boundaries.meta[BOUNDARIES] = table.boundaries
    with rewriter.before(table.timestep.next if table.timestep.next.op != "placeholder" else _after_inputs(rewriter)):
        number = rewriter.call(aten.to.dtype, (table.timestep, torch.float32), [table.timestep], name="timestep_number")
        bins = rewriter.call(_BUCKETIZE, (number, boundaries), [table.timestep], name="timestep_bins")
        return rewriter.call(aten.view.default, (bins, [-1]), [table.timestep], name="timestep_bin")


def _after_inputs(rewriter: Rewriter) -> fx.Node:
    nodes = list(rewriter.graph.nodes)
    last = max(position for position, node in enumerate(nodes) if node.op in ("placeholder", "get_attr"))
    first = next(position for position, node in enumerate(nodes) if node.op not in ("placeholder", "get_attr"))
    return nodes[first] if first < last else nodes[last + 1]
