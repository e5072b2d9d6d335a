"""Fold per-channel shifts into the ops that produce the value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from fxquant.channels.apply import agreed, fold_into_parameters
from fxquant.channels.solution import Edit, Request, Seed
from fxquant.ir.arguments import args
from fxquant.ir.attention import ValueChange, note_change
from fxquant.ir.borders import note_shifts
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.stages import Stage
from fxquant.ir.time_tables import TimeTable, add_rows, read_table, rows_at, timestep_input
from fxquant.passes._seeds import parse_cost
from fxquant.pipeline.pipeline import Pass, Tier, register_pass
from fxquant.planning.context import PassContext
from fxquant.planning.plan import Plan

_AFFINE = torch.ops.fxquant.channel_affine.default


@register_pass
@dataclass(frozen=True)
class AbsorbShifts(Pass):
    """Push each ``channel_affine(x, 1, c)`` back through its producers until it ends in biases.

    Before, for an adaLN::

        gamma, beta = chunk(linear(silu(cond), W, bias)); x = layer_norm(h) * (1 + gamma) + beta
        y = channel_affine(x, 1, c[bin])

    After::

        gamma, beta = chunk(linear(silu(cond), W) + table[bin]); y = layer_norm(h) * (1 + gamma) + beta

    The table is the bias, plus c in the rows of beta. A shift passes through attention into the bias of V, because the
    rows of a softmax sum to 1. The rules for all ops are in :mod:`fxquant.channels.rules`. If a path cannot be followed
    to a bias, the shift is added to a modulation vector instead. If that is not possible either, the
    ``channel_affine`` stays in place. Equal in real arithmetic.

    Attributes:
        dearest: The highest run-time cost allowed: ``in-place`` (only parameters that the model has), ``free`` or
            ``vector``. Shifts that need more stay in the graph as a ``channel_affine``.
    """

    name: ClassVar[str] = "absorb-shifts"
    tier: ClassVar[Tier] = Tier.ALGEBRAIC
    requires: ClassVar[Stage] = Stage.TRANSFORMED
    establishes: ClassVar[Stage] = Stage.TRANSFORMED
    keeps_inputs: ClassVar[bool] = True

    dearest: str = "vector"

    def __post_init__(self) -> None:
        parse_cost(self.dearest)

    def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
        affines = _shifts(graph, context.plan, rewriter)
        if not affines:
            return
        timestep = timestep_input(graph, context.plan.timestep)
        request = Request.STATIC_SHIFT if all(table.static for table in affines.values()) else Request.SHIFT
        seeds = [Seed(node.name, args(node).node("x"), (node,)) for node in affines]
        tables = {node.name: table for node, table in affines.items()}
        shifts = {name: _by_channel(table) for name, table in tables.items()}
        solution = agreed(graph, seeds, shifts, request, timestep, parse_cost(self.dearest))
        chosen = {name: tables[name] for name in solution.grants}
        for node, table in solution.marked_shifts(chosen):
            note_shifts(node, table.rows)
        for edit, table in solution.shifts(chosen):
            if (table.rows != 0).any():
                _carry_out(edit, table, rewriter)
        for reader, table in solution.mixed_shifts(chosen):
            note_change(reader, ValueChange(torch.ones((), dtype=torch.float64), table.rows, table.boundaries))
        for node, table in affines.items():
            if node.name in chosen:
                _remove(node, table, torch.from_numpy(solution.grants[node.name].granted), rewriter)


def _shifts(graph: fx.Graph, plan: Plan, rewriter: Rewriter) -> dict[fx.Node, TimeTable]:
    """The affines that only shift, by a constant or by a row of a table."""
    found = {}
    for node in graph.nodes:
        if node.target is not _AFFINE or args(node).shift is None:
            continue
        scale, shift = args(node).node("scale"), args(node).node("shift")
        if scale.op == "get_attr":
            table = read_table(shift, timestep_input(graph, plan.timestep), rewriter)
            channels = node.meta["val"].shape[-1]
            if table is not None and table.rows[0].numel() == channels and (rewriter.tensor(scale) == 1).all():
                found[node] = table.map(lambda rows: rows.flatten(1).double().cpu())
    return found


def _by_channel(table: TimeTable) -> list[tuple[object, ...]]:
    """What identifies the shift of each channel."""
    return [(table.boundaries, column.tobytes()) for column in table.rows.T.cpu().numpy()]


def _carry_out(edit: Edit, table: TimeTable, rewriter: Rewriter) -> None:
    if edit.end is None:
        add_rows(rewriter, edit.node, table.map(lambda rows: rows.squeeze(1)), [edit.node], edit.readers)
    else:
        fold_into_parameters(edit, edit.end, rewriter, table)


def _remove(affine: fx.Node, table: TimeTable, granted: Tensor, rewriter: Rewriter) -> None:
    left = table.map(lambda rows: torch.where(granted.to(rows.device), 0.0, rows))
    if not (left.rows != 0).any():
        rewriter.replace(affine, args(affine).node("x"))
    elif (left.rows != table.rows).any():  # Some shifts could not be absorbed; they are applied at run time.
        rank = args(affine).node("x").meta["val"].dim()
        with rewriter.before(affine):
            rows = rows_at(rewriter, left, rank, f"{affine.name}_left", [affine])
        rewriter.redirect(affine, args(affine).node("shift"), rows)
