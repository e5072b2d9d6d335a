"""Balancing and shifting of random graphs: whatever the walk grants, the outputs stay what they were, in float64.

``FXQUANT_FUZZ=20000`` in the environment asks for that many graphs, other ones each time; ``make fuzz`` does.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from fxquant.calibrate import copy_graph
from fxquant.channels.rules import RULES, SHIFTS, STATIC_SHIFTS
from tests.fuzz.builder import Builder
from tests.fuzz.graphs import graphs
from tests.fuzz.proof import Census, algebraic, prove

ASKED = int(os.environ.get("FXQUANT_FUZZ", "0"))
SHARD = 500
"""Graphs a test: ``make test`` runs one, always the same graphs, ``make fuzz`` as many as were asked for."""

NOT_GENERATED: dict[Any, str] = {
    torch.ops.fxquant.channel_affine.default: "only passes make it, and others then meet it"
}
"""Keys of the rule tables that no graph can have, and why."""

ROLES = st.sampled_from(["block", "block", "block+adaln+embedder+patch+final"])
COSTS = st.sampled_from(["vector", "vector", "free", "tokens"])
PREPARE = st.sampled_from(
    [
        "remove-no-ops,assign-precision",
        "assign-precision",
        "assign-precision{layers=all}",
        "assign-precision{overrides=blocks.0.l3=float;blocks.0.l5=w8a16}",
    ]
)


@st.composite
def pipelines(draw: Any) -> str:
    """Passes as recipes have them, and with other options and in another order."""
    kind = draw(st.integers(0, 5))
    if kind == 0:
        return draw(st.sampled_from([algebraic(name) for name in ("htg-w8a8", "repq-w8a8", "ptq4dit-w8a8")]))
    roles, dearest = draw(ROLES), draw(COSTS)
    shared = f"dearest={dearest} roles={roles}"
    salience = draw(st.sampled_from(["spearman", "max", "mean", "moving-average"]))
    how = draw(st.sampled_from([f"salience={salience}", f"salience={salience} exponent=1", "search=3"]))
    balance = f"balance-channels{{{how} {shared}}},absorb-affines"
    groups, method = draw(st.integers(1, 4)), draw(st.sampled_from(["greedy", "optimal"]))
    shift = f"group-timesteps{{groups={groups} method={method} {shared}}},shift-channels{{{shared}}},absorb-shifts"
    return {1: balance, 2: shift, 3: f"{shift},{balance}", 4: f"{shift},{balance}"}.get(kind, f"{balance},{shift}")


@pytest.mark.parametrize("shard", range(max(1, -(-ASKED // SHARD))))
def test_rewritten_graphs_compute_the_same(shard: int) -> None:
    census = Census()

    @settings(
        max_examples=min(ASKED or SHARD, SHARD),
        deadline=None,
        derandomize=not ASKED,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(graphs(), PREPARE, pipelines(), st.integers(0, 3))
    def check(builder: Builder, before: str, passes: str, number: int) -> None:
        captured = copy_graph(builder.module)  # The builder's own is rewritten in place.
        try:
            prove(builder, passes, before, replayed=number == 0, census=census)
        except Exception:
            note(f"{captured.graph}\n{before} ; {passes}")
            raise

    check()
    print(census)
    if not 0 < ASKED < SHARD:
        not_about_nothing(census)


def not_about_nothing(census: Census) -> None:
    """The graphs have nearly all ops with rules, and most of them were rewritten."""
    keys = {*RULES, *SHIFTS, *STATIC_SHIFTS} - NOT_GENERATED.keys()
    missing = keys - set(census.ops)  # Choices are not drawn evenly, so a few of the rarest are missing by chance.
    assert len(missing) <= len(keys) // 5, missing
    assert census.rewritten > 0.7 * census.graphs
    assert all(Counter(census.edits)[name] for name in ("absorb-affines", "absorb-shifts", "balance-channels"))
