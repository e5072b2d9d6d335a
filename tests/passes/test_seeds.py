"""What balancing and shifting share: decisions on layers that calls of another kind settled in part."""

from __future__ import annotations

import pytest
import torch

from fxquant.passes._seeds import follow
from fxquant.planning.decisions import Balance, LayerPlan, Shift, TimestepGroups
from fxquant.planning.plan import Plan


def planned(*names: str) -> Plan:
    plan = Plan("", "", "timestep")
    for name in names:
        plan.layers[name] = LayerPlan("linear", "block", [4, 4], 4, 8)
    return plan


@pytest.mark.parametrize(("decision", "suffix"), [("balance", ""), ("shift", ".shift")])
def test_a_layer_that_reads_a_settled_value_undoes_the_same(decision, suffix):
    plan = planned("q", "k")
    entry = Balance("free", ["norm"], 4, "q") if decision == "balance" else Shift("free", ["norm"], 4)
    setattr(plan.layer("q"), decision, entry)
    plan.vectors[f"q{suffix}"] = torch.rand(4, dtype=torch.float64)
    follow(decision, [["k", "q"]], plan)
    assert getattr(plan.layer("k"), decision) == entry
    assert getattr(plan.layer("k"), decision).into is not entry.into
    assert torch.equal(plan.vectors[f"k{suffix}"], plan.vectors[f"q{suffix}"])


@pytest.mark.parametrize(("decision", "suffix"), [("balance", ""), ("shift", ".shift")])
def test_a_layer_that_only_shares_channels_with_a_settled_one_stays_as_it_is(decision, suffix):
    plan = planned("q", "k")
    setattr(plan.layer("q"), decision, Balance("free") if decision == "balance" else Shift("free"))
    plan.vectors[f"q{suffix}"] = torch.rand(4, dtype=torch.float64)
    follow(decision, [["q"], ["k"]], plan)
    found = getattr(plan.layer("k"), decision)
    assert found.cost == "not" and "calls of another kind" in found.reason
    assert f"k{suffix}" not in plan.vectors


def test_shifts_of_other_groups_of_timesteps_are_not_taken_over():
    plan = planned("q", "k")
    plan.layer("q").shift, plan.layer("q").timesteps = Shift("free"), TimestepGroups([500.0])
    plan.vectors["q.shift"] = torch.rand(2, 4, dtype=torch.float64)
    follow("shift", [["q", "k"]], plan)
    found = plan.layer("k").shift
    assert found is not None and found.cost == "not" and found.reason is not None
    assert "q reads the same value and was settled with other groups of timesteps" in found.reason
    assert "k.shift" not in plan.vectors
