"""Rotations that producers absorb: which blocks of channels can be rotated offline, and what is rotated for that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from fxquant.channels.solution import Edit, Request, Seed, Solution
from fxquant.channels.walk import solve
from fxquant.channels.wants import Want
from fxquant.ir.layer_changes import OutputTurn

Classes = tuple[int, ...]
"""The classes of the channels of one block, in order. Blocks with the same classes are rotated together."""


@dataclass(frozen=True)
class Rotations:
    """Values that can be rotated offline as a whole.

    Attributes:
        solution: What the walk found.
        refused: By name, why the other seeds cannot be rotated offline.
    """

    solution: Solution
    refused: Mapping[str, str]

    def keys(self, name: str) -> list[Classes]:
        """The classes of each block of a value."""
        grant = self.solution.grants[name]
        return [tuple(row) for row in grant.classes.reshape(-1, grant.seed.block).tolist()]

    def into(self, name: str) -> list[str]:
        """What absorbs the rotation of a value."""
        return list(self.solution.grants[name].into)

    def turns(self, signs: Mapping[Classes, Tensor]) -> Iterator[tuple[Edit, OutputTurn]]:
        """Each edit with the rotation that it carries out, given the signs of each block, int8 ``[block]``."""
        for edit in self.solution.edits:
            for turn in self._turns_of(edit.want, signs):
                yield edit, turn

    def marked(self, signs: Mapping[Classes, Tensor]) -> Iterator[tuple[fx.Node, OutputTurn]]:
        """Each value that a module receives or returns with its rotation; signs as for :meth:`turns`."""
        for node, want in self.solution.marked.items():
            for turn in self._turns_of(want, signs):
                yield node, turn

    def _turns_of(self, want: Want, signs: Mapping[Classes, Tensor]) -> Iterator[OutputTurn]:
        home = {number: key for key in signs for number in key}
        classes = _flat_classes(self.solution, want)
        place = {number: position for position, number in enumerate(classes) if number in home}
        keys = dict.fromkeys(home[number] for number in place)
        sizes: dict[int, list[Classes]] = {}
        for key in keys:
            sizes.setdefault(len(key), []).append(key)
        for of_size in sizes.values():
            places = torch.tensor([[place[number] for number in key] for key in of_size])
            yield OutputTurn(places, torch.stack([signs[key] for key in of_size]))


def largest_rotations(graph: fx.Graph, sizes: Mapping[Seed, Sequence[int]], fixed: Mapping[str, Tensor]) -> Rotations:
    """Find the values that can be rotated offline, each by the largest blocks that producers allow.

    Args:
        graph: A graph with shapes.
        sizes: For each value, whose seed needs no size of blocks, the sizes that are possible.
        fixed: As for :func:`solve_rotations`.
    """
    smallest = solve_rotations(graph, [replace(seed, block=min(own)) for seed, own in sizes.items()], fixed)
    taken: list[Seed] = []
    for size in sorted({size for own in sizes.values() for size in own}, reverse=True):
        done = {*smallest.refused, *(seed.name for seed in taken)}
        trial = [replace(seed, block=size) for seed, own in sizes.items() if size in own and seed.name not in done]
        if trial:
            refused = solve_rotations(graph, [*taken, *trial], fixed).refused
            taken += [seed for seed in trial if seed.name not in refused]
    found = solve_rotations(graph, taken, fixed)
    return Rotations(found.solution, {**smallest.refused, **found.refused})


def solve_rotations(graph: fx.Graph, seeds: Sequence[Seed], fixed: Mapping[str, Tensor]) -> Rotations:
    """Find the values that can be rotated offline, all of their channels. The graph does not change.

    Args:
        graph: A graph with shapes.
        seeds: The values, each with the size of its blocks.
        fixed: Signs that are decided already, int8 ``[channels]``, by name. Values that are rotated together, and whose
            decided signs differ, are refused.
    """
    kept, refused = list(seeds), {}
    while True:
        solution = solve(graph, kept, request=Request.ROTATION)
        wrong = _wrong_classes(solution)
        known: dict[Classes, bytes] = {}
        left = []
        for seed in kept:
            grant = solution.grants[seed.name]
            keys = [tuple(row) for row in grant.classes.reshape(-1, seed.block).tolist()]
            reason = None
            if not grant.granted.all():
                reason = grant.reason or "nothing upstream can be rotated"
            elif wrong.intersection(number for key in keys for number in key):
                reason = "blocks of channels meet that do not hold the same channels"
            elif seed.name in fixed:
                rows = fixed[seed.name].reshape(-1, seed.block).numpy()
                if any(
                    known.setdefault(key, row.tobytes()) != row.tobytes() for key, row in zip(keys, rows, strict=True)
                ):
                    reason = "it was decided to be rotated by other signs than a value that is rotated with it"
            if reason is not None:
                refused[seed.name] = reason
                left.append(seed)
        if not left:
            return Rotations(solution, refused)
        kept = [seed for seed in kept if seed not in left]


def _flat_classes(solution: Solution, want: Want) -> list[int]:
    return [int(number) for number in solution.classes_of(want).ravel()]


def _wrong_classes(solution: Solution) -> set[int]:
    """Classes of blocks that overlap with others in part, or that one edit meets twice."""
    home: dict[int, Classes] = {}
    wrong: set[int] = set()
    for grant in solution.grants.values():
        for row in grant.classes.reshape(-1, grant.seed.block).tolist():
            key = tuple(row)
            others = {home.setdefault(number, key) for number in key}
            if others != {key} or len(set(key)) < len(key):
                wrong.update(key, *others)
    for edit in solution.edits:
        counts = Counter(number for number in _flat_classes(solution, edit.want) if number in home)
        for number, count in counts.items():
            if count > 1:
                wrong.update(home[number])
    return wrong
