"""Ranks exchange values, wait for each other, and notice those that fail."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from fxquant.distributed.team import Team
from fxquant.errors import ConfigurationError, RankError, RanksDifferError
from tests.distributed import work
from tests.distributed.ranks import Ended, run_ranks


@pytest.mark.parametrize("size", [2, 4])
def test_exchange(size):
    found = run_ranks(work.exchange, size)
    for rank, got in enumerate(found):
        assert [one["rank"] for one in got["gathered"]] == list(range(size))
        assert [one["tensor"].tolist() for one in got["gathered"]] == [[rank] * (rank + 1) for rank in range(size)]
        assert got["from 1"] == "of 1"
        assert torch.equal(got["total"], torch.arange(5.0) * sum(range(size + 1)))
        assert got["count"] == sum(range(size + 1)), rank
    assert sorted(item for got in found for item in got["share"]) == list(range(10))
    assert [got["first"] for got in found].count(True) == 1


def test_error_of_one_rank_reaches_the_others_at_once():
    found = run_ranks(work.fail, 4, "raises", 0.5)
    assert isinstance(found[1], ValueError)
    for rank in (0, 2, 3):
        assert isinstance(found[rank], RankError)
        assert str(found[rank]) == "rank 1 failed: ValueError: no more ink"


@pytest.mark.parametrize("failing", [0, 1])
def test_error_reaches_a_rank_that_was_busy(failing):
    """The process with the store sees the error, or has it, long before; it ends after the others have read it."""
    found = run_ranks(work.fail, 3, "raises", 0.1, failing, 1.5)
    assert isinstance(found[failing], ValueError)
    for rank in {0, 1, 2} - {failing}:
        assert str(found[rank]) == f"rank {failing} failed: ValueError: no more ink"


def test_killed_rank_is_named_within_seconds():
    found = run_ranks(work.fail, 4, "dies", 0.5)
    assert isinstance(found[1], Ended)
    assert found[1].args == (-9,)
    for rank in (0, 2, 3):
        assert isinstance(found[rank], RankError)
        assert str(found[rank]).startswith("rank 1 died without a message")


def test_killed_rank_that_holds_the_store():
    found = run_ranks(work.fail, 3, "dies", 0.5, 0)
    assert isinstance(found[0], Ended)
    for rank in (1, 2):
        assert isinstance(found[rank], RankError)
        assert str(found[rank]).startswith("rank 0 died without a message")


def test_waiting_is_longer_than_the_timeout_of_the_group():
    assert min(run_ranks(work.slow, 2, 3.0)) >= 2.9


def test_group_without_a_backend_for_the_device():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ConfigurationError, match="no backend for tensors on meta, only cpu:gloo"):
            Team(dist.group.WORLD, "meta")
    finally:
        dist.destroy_process_group()


def test_ranks_that_were_given_something_else():
    given = [{"torch": "2.13", "recipe": "rtn-w8a8"}, {"torch": "2.13", "recipe": "rtn-w4a8"}]
    for error in run_ranks(work.differ, 2, given):
        assert isinstance(error, RanksDifferError)
        assert isinstance(error, ConfigurationError)
        assert "rank 1 has another recipe than rank 0: rtn-w4a8, not rtn-w8a8" in str(error)
    assert run_ranks(work.differ, 2, given[:1] * 2) == [None, None]
