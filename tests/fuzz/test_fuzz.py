"""Balancing and shifting of random graphs: whatever the walk grants, the outputs stay what they were, in float64.

``FXQUANT_FUZZ=20000`` in the environment asks for that many graphs, other ones each time; ``make fuzz`` does.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, reject, settings

from fxquant.channels.rules import RULES, SHIFTS, STATIC_SHIFTS
from tests.fuzz.cases import Case, cases
from tests.fuzz.proof import Census, SenselessError, prove

ASKED = int(os.environ.get("FXQUANT_FUZZ", "0"))
SHARD = 500
"""Graphs a test: ``make test`` runs one, always the same graphs, ``make fuzz`` as many as were asked for."""

NOT_GENERATED: dict[Any, str] = {
    torch.ops.fxquant.channel_affine.default: "only passes make it, and others then meet it",
}
"""Keys of the rule tables that no graph has, and why."""


@pytest.mark.parametrize("shard", range(max(1, -(-ASKED // SHARD))))
def test_rewritten_graphs_compute_the_same(shard: int) -> None:
    census = Census()

    @settings(
        max_examples=min(ASKED or SHARD, SHARD),
        deadline=None,
        derandomize=not ASKED,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases())
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


def run(case: Case, census: Census | None = None) -> None:
    """Prove a case."""
    prove(case.build(), case.passes, case.before, case.replayed, census)


def fails(case: Case) -> bool:
    """Whether a case, which may be senseless, is a failure."""
    try:
        run(case)
    except SenselessError:
        return False
    except Exception:  # Of any kind: that is what is looked for.
        return True
    return False


def not_about_nothing(census: Census) -> None:
    """The graphs have all ops with rules, and all passes changed some."""
    assert {*RULES, *SHIFTS, *STATIC_SHIFTS} - set(census.ops) == NOT_GENERATED.keys()
    assert all(census.edits[name] for name in ("absorb-affines", "absorb-shifts", "balance-channels"))
