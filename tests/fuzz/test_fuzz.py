"""Exact passes on random graphs: for everything that the walk grants, outputs stay the same in float64.

``FXQUANT_FUZZ=20000`` in the environment requests 20000 graphs, different ones each time; ``make fuzz`` sets it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, note, reject, settings

from fxquant.channels.rules import RULES, SHIFTS, STATIC_SHIFTS
from tests.fuzz.cases import Case, case, cases
from tests.fuzz.proof import Census, SenselessError, prove

ASKED = int(os.environ.get("FXQUANT_FUZZ", "0"))
SHARD = 500
"""Graphs per test of ``make fuzz``."""

SAMPLE = 12
"""Graphs that ``make test`` rewrites, always the same ones, besides those of COVERING."""

COVERING = (68, 170, 111, 23, 20, 250, 26, 124, 240, 2, 33, 34, 152, 179, 16, 74, 155, 248)
"""Seeds of graphs that together contain all ops with rules. ``make test`` rewrites these first."""

EXACT = ("absorb-affines", "absorb-shifts", "balance-channels", "rotate-channels", "shift-channels", "split-low-rank")
"""Passes that keep the function and that each have to change some graph."""

NOT_GENERATED: dict[Any, str] = {
    torch.ops.fxquant.channel_affine.default: "only passes make it, and others then meet it",
}
"""Keys of the rule tables that no graph contains, with the reason."""


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(max(1, -(-ASKED // SHARD))))
def test_rewritten_graphs_compute_the_same(shard: int) -> None:
    census = Census()

    @settings(
        max_examples=min(ASKED or SAMPLE, SHARD),
        deadline=None,
        derandomize=not ASKED,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases())
    @examples(() if ASKED else COVERING)
    def check(case: Case) -> None:
        try:
            run(case, census)
        except SenselessError:
            reject()
        except Exception:
            smallest = case.shrunk(fails)
            note(f"{smallest.build().module.graph}\n{smallest}")
            raise

    check()
    print(census)
    assert census.rewritten > 0.7 * census.graphs
    if not ASKED:
        not_about_nothing(census)


def examples(seeds: Sequence[int]) -> Callable[[Any], Any]:
    """A decorator that also tries the cases of these seeds."""
    return lambda check: functools.reduce(lambda inner, seed: example(case(seed))(inner), seeds, check)


def run(case: Case, census: Census | None = None) -> None:
    """Prove a case."""
    prove(case.build(), case.passes, case.before, case.replayed, census)


def fails(case: Case) -> bool:
    """Whether a case is a failure; a case that allows no comparison is not."""
    try:
        run(case)
    except SenselessError:
        return False
    except Exception:  # Any exception is a failure.
        return True
    return False


def not_about_nothing(census: Census) -> None:
    """Assert that the graphs contain all ops with rules, and that every pass changed some graph."""
    assert {*RULES, *SHIFTS, *STATIC_SHIFTS} - set(census.ops) == NOT_GENERATED.keys()
    assert all(census.edits[name] for name in EXACT)
