"""Fold per-channel shifts into the ops that produce the value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, fx

from fxquant.channels.solution import Edit, Request, Seed, Solution
from fxquant.channels.walk import solve
from fxquant.channels.wants import Cost
from fxquant.ir.arguments import args
from fxquant.ir.attention import ValueChange, note_change
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.stages import Stage
from fxquant.ir.time_tables import TimeTable, add_rows, read_table, rows_at, timestep_input
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
    """

    name: ClassVar[str] = "absorb-shifts"
    tier: ClassVar[Tier] = Tier.ALGEBRAIC
    requires: ClassVar[Stage] = Stage.TRANSFORMED
    establishes: ClassVar[Stage] = Stage.TRANSFORMED

    def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
        affines = _shifts(graph, context.plan, rewriter)
        if not affines:
            return
        timestep = timestep_input(graph, context.plan.timestep)
        request = Request.STATIC_SHIFT if all(table.static for table in affines.values()) else Request.SHIFT
        seeds = [Seed(node.name, node.all_input_nodes[0], (node,)) for node in affines]
        tables = {node.name: table for node, table in affines.items()}
        solution = _agreed(graph, seeds, tables, request, timestep)
        chosen = {name: tables[name] for name in solution.grants}
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
                found[node] = table.map(lambda rows: rows.flatten(1).double())
    return found


def _agreed(
    graph: fx.Graph,
    seeds: Sequence[Seed],
    tables: Mapping[str, TimeTable],
    request: Request,
    timestep: fx.Node,
) -> Solution:
    """A solution in which all channels of a class have the same shift. Seeds that prevent this are left out."""
    kept = list(seeds)
    while True:
        solution = solve(graph, kept, Cost.VECTOR, request, timestep)
        first: dict[int, tuple[object, ...]] = {}
        spoilers = set()
        for seed in kept:
            table, grant = tables[seed.name], solution.grants[seed.name]
            columns = table.rows.T.cpu().numpy()
            for channel in np.flatnonzero(grant.granted):
                mine = (table.boundaries, columns[channel].tobytes())
                if first.setdefault(int(grant.classes[channel]), mine) != mine:
                    spoilers.add(seed.name)
        if not spoilers:
            return solution
        kept = [seed for seed in kept if seed.name not in spoilers]


def _carry_out(edit: Edit, table: TimeTable, rewriter: Rewriter) -> None:
    if edit.end is None:
        add_rows(rewriter, edit.node, table.map(lambda rows: rows.squeeze(1)), [edit.node], edit.readers)
    elif edit.node.op == "get_attr":
        shift = table.rows[0]
        rewriter.fold_attribute(edit.node, lambda p: p.double() + shift.to(p.device), edit.readers, ("shift", shift))
    else:
        edit.end.fold(rewriter, table)


def _remove(affine: fx.Node, table: TimeTable, granted: Tensor, rewriter: Rewriter) -> None:
    left = table.map(lambda rows: torch.where(granted.to(rows.device), 0.0, rows))
    if not (left.rows != 0).any():
        rewriter.replace(affine, affine.all_input_nodes[0])
    elif (left.rows != table.rows).any():  # Some shifts could not be absorbed; they are applied at run time.
        source, one = affine.all_input_nodes[:2]
        with rewriter.before(affine):
            rows = rows_at(rewriter, left, source.meta["val"].dim(), f"{affine.name}_left", [affine])
        affine.args = (source, one, rows)
