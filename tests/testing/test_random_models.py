"""Random models for the tests of passes of other packages."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from fxquant.errors import MissingPackageError
from fxquant.testing import RandomGraph, graphs, prove, random_graph


def outputs(found: RandomGraph) -> list[torch.Tensor]:
    with torch.no_grad():
        return [found.model(**call) for call in found.calls]


def test_a_seed_makes_the_same_model_again() -> None:
    for seed in range(40):
        found, again = random_graph(seed), random_graph(seed)
        assert all(map(torch.equal, outputs(found), outputs(again)))
        assert all(map(torch.equal, outputs(found), outputs(found)))  # No dropout.
        assert all(result.isfinite().all() and result.shape == (2, 3, 4) for result in outputs(found))
        assert len({frozenset(call) for call in found.calls}) == 1
    assert len({str(random_graph(seed).model) for seed in range(20)}) > 5
    assert eval(repr(found), {"random_graph": random_graph}).seed == found.seed


def test_dtypes() -> None:
    found = random_graph(3, torch.bfloat16)
    assert {result.dtype for result in outputs(found)} == {torch.bfloat16}


def test_the_strategy() -> None:
    seeds = set()

    @settings(max_examples=10, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(graphs(torch.float64))
    def check(found: RandomGraph) -> None:
        seeds.add(found.seed)
        assert all(result.dtype == torch.float64 for result in outputs(found))

    check()
    assert len(seeds) > 5


@pytest.mark.slow
def test_a_pass_is_proved_on_one() -> None:
    found = random_graph(1)
    assert prove("balance-channels", found.model, found.calls).error < 1e-12


def test_without_hypothesis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(MissingPackageError, match=r"pip install hypothesis; or use fxquant.*graph\(seed\)"):
        graphs()
    assert random_graph(0).calls
