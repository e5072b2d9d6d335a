"""Carries out requests whose values are known: what passes that absorb factors or shifts have in common."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import fx

from fxquant.channels.solution import Edit, Request, Seed, Solution
from fxquant.channels.walk import solve
from fxquant.channels.wants import Cost, End
from fxquant.ir.rewriter import Rewriter


def agreed(
    graph: fx.Graph,
    seeds: Sequence[Seed],
    values: Mapping[str, Sequence[Hashable]],
    request: Request = Request.FACTOR,
    timestep: fx.Node | None = None,
    dearest: Cost = Cost.VECTOR,
) -> Solution:
    """A solution in which all channels of a class have the same value. Seeds that prevent this are left out.

    Args:
        graph: The graph.
        seeds: The values that are scaled or shifted.
        values: For each seed, one value per channel: a factor, or what identifies a shift.
        request: What is requested.
        timestep: The input that holds the timestep, for shifts.
        dearest: Cost of the most expensive edit allowed.
    """
    numbers: dict[Hashable, int] = {}  # Equal values have equal numbers.
    marks = {name: np.array([numbers.setdefault(v, len(numbers)) for v in own]) for name, own in values.items()}
    kept = list(seeds)
    while True:
        solution = solve(graph, kept, dearest, request, timestep)
        mark_of = np.full(solution.classes, -1)  # For each class, the value of the first channel that has one.
        spoilers = set()
        for seed in kept:
            grant = solution.grants[seed.name]
            classes, own = grant.classes[grant.granted], marks[seed.name][grant.granted]
            new = mark_of[classes] < 0
            mark_of[classes[new][::-1]] = own[new][::-1]
            if (mark_of[classes] != own).any():
                spoilers.add(seed.name)
        if not spoilers:
            return solution
        kept = [seed for seed in kept if seed.name not in spoilers]


def fold_into_parameters(edit: Edit, end: End, rewriter: Rewriter, *change: Any) -> fx.Node:
    """Carry out an edit that ends in parameters; returns the node whose value changes.

    A parameter changes for the readers of the edit only.

    Args:
        edit: The edit.
        end: How it ends.
        rewriter: The rewriter of the graph.
        change: The factors and offsets, or the table of shifts.
    """
    if edit.node.op == "get_attr":
        return end.fold(rewriter, *change, readers=edit.readers) or edit.node
    end.fold(rewriter, *change)
    return edit.node
