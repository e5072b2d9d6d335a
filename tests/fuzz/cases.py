"""Cases for the proof by fuzzing: a graph and the passes that rewrite it.

Hypothesis draws only the seed of a case. A generator with this seed draws everything else uniformly, because Hypothesis
itself draws some choices far more often than others and makes five of six examples by repeating parts of the previous
one. Hypothesis cannot shrink what it does not draw, so :meth:`Case.shrunk` does.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from hypothesis import strategies as st

from fxquant.pipeline.pipeline import Tier
from fxquant.pipeline.recipes import make_recipe
from tests.fuzz.builder import Builder
from tests.fuzz.graphs import build

PREPARE = (
    "remove-no-ops,assign-precision",
    "assign-precision",
    "assign-precision{layers=all}",
    "assign-precision{overrides=blocks.0.l3=float;blocks.0.l5=w8a16}",
)
"""Passes before calibration."""


@dataclass(frozen=True)
class Case:
    """The seeds of one graph, and the passes to run on it.

    Attributes:
        first: Seed of the inputs and of all numbers; see :func:`tests.fuzz.graphs.build`.
        steps: Seed of each step.
        last: Seed of the end of the graph.
        before: Pipeline text before calibration.
        passes: Pipeline text after calibration.
        replayed: Whether the plan is also applied to the original graph.
    """

    first: int
    steps: tuple[int, ...]
    last: int
    before: str
    passes: str
    replayed: bool

    def build(self) -> Builder:
        """The finished graph with its builder."""
        return build(self.first, self.steps, self.last)

    def shrunk(self, fails: Callable[[Case], bool]) -> Case:
        """The case without the steps that its failure does not need."""
        for position in reversed(range(len(self.steps))):
            fewer = dataclasses.replace(self, steps=self.steps[:position] + self.steps[position + 1 :])
            if fails(fewer):
                return fewer.shrunk(fails)
        return self


def cases() -> st.SearchStrategy[Case]:
    """Cases, all equally likely. From ranges above 2^24, Hypothesis draws small numbers more often."""
    return st.integers(0, 2**24 - 1).map(case)


def case(seed: int) -> Case:
    """The case of a seed."""
    r = Random(seed)
    steps = tuple(r.getrandbits(32) for _ in range(r.randint(1, 14)))
    first, last, before, passes = r.getrandbits(32), r.getrandbits(32), r.choice(PREPARE), pipeline(r)
    return Case(first, steps, last, before, passes + low_bits(Random(seed)), replayed=r.random() < 1 / 4)


def pipeline(r: Random) -> str:
    """Passes as in recipes, or with other options and in another order."""
    roles = r.choice(["block", "block", "block+adaln+embedder+patch+final"])
    shared = f"dearest={r.choice(['vector', 'vector', 'free', 'tokens'])} roles={roles}"
    salience = f"salience={r.choice(['spearman', 'max', 'mean', 'moving-average'])}"
    how = r.choice([salience, f"{salience} exponent=1", "search=3"])
    balance = f"balance-channels{{{how} {shared}}},absorb-affines"
    grouping = f"groups={r.randint(1, 4)} method={r.choice(['greedy', 'optimal'])}"
    shift = f"group-timesteps{{{grouping} {shared}}},shift-channels{{{shared}}},absorb-shifts"
    recipe = algebraic(r.choice(["htg-w8a8", "repq-w8a8", "ptq4dit-w8a8"]))
    return r.choice([recipe, balance, shift, f"{shift},{balance}", f"{shift},{balance}", f"{balance},{shift}"])


def low_bits(r: Random) -> str:
    """Rotations and branches behind the other passes, or neither."""
    rotation = f",rotate-channels{{least=2 seed={r.randint(0, 3)} offline={r.random() < 3 / 4}}}"
    branch = f",split-low-rank{{rank={r.randint(1, 2)} iterations={r.choice([0, 0, 1])}}}"
    return r.choice(["", "", rotation, branch, rotation + branch])


@functools.cache
def algebraic(recipe: str) -> str:
    """The passes of a recipe that preserve the function."""
    passes = make_recipe(recipe).convert
    return ",".join(str(step) for step in passes if step.tier is not Tier.LOSSY)
