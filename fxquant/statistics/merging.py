"""Statistics that several ranks recorded of their parts of the data, made one: the same on all ranks."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from fxquant.statistics.channels import ChannelStatistics
from fxquant.statistics.collection import Statistics
from fxquant.statistics.kept_calls import KeptCall, KeptCalls
from fxquant.statistics.moments import SecondMoments

if TYPE_CHECKING:
    from fxquant.distributed.team import Team

T = TypeVar("T")


def merge_ranks(own: Statistics, team: Team, seed: int) -> Statistics:
    """Merge the statistics of all ranks, in the order of the ranks, whichever arrives first.

    Extremes and counts are exactly those of one process. Rows and kept calls have the same distribution as in one
    process. Second moments are those of as many rows, summed in another order.

    Args:
        own: What this rank recorded (:meth:`Statistics.for_rank`); it must not be used afterwards.
        team: The ranks.
        seed: Seed of the merged statistics, for what is recorded later.

    Returns:
        The merged statistics, with the same bits on all ranks.

    Raises:
        CalibrationError: The channels of a value differ between ranks.
        RankError: Another rank failed or died.
    """
    made = Statistics(num_rows=own.num_rows, seed=seed, transient=own.transient, keep_calls=own.calls.most)
    keys = _in_order(team.gather(list(own)))
    for key in keys:
        made._by_key[key] = _channels(made, key, own._by_key.pop(key, None), team)
    for calls in team.gather((own.calls.kinds, list(own.calls), own.calls.seen)):
        made.calls.merge(_kept(*calls))
    made.wants_moments = own.wants_moments
    return made


def _channels(made: Statistics, key: str, own: ChannelStatistics | None, team: Team) -> ChannelStatistics:
    """The statistics of one value on all ranks; ``own`` is None where the value was not seen."""
    moments = None if own is None else own.moments
    sent = copy.copy(own)
    if sent is not None:
        sent.moments = None
    told = None if moments is None else (moments.dtype, moments.sums, moments.counts)
    gathered = team.gather((sent, told))
    merged = made._new(key)
    for other, _ in gathered:
        if other is not None:
            merged.merge(other)
    recorded = [told for _, told in gathered if told is not None]
    if recorded:
        dtype = torch.float64 if any(dtype == torch.float64 for dtype, _, _ in recorded) else torch.float32
        merged.moments = moments or SecondMoments(merged.channels, team.device)
        merged.moments.sum_over(team, dtype, [(sums, counts) for _, sums, counts in recorded])
    return merged


def _kept(kinds: list[dict[str, Any]], calls: list[KeptCall], seen: int) -> KeptCalls:
    found = KeptCalls(len(calls), kinds=kinds)
    found.restore(calls, seen)
    return found


def _in_order(lists: Iterable[Iterable[T]]) -> list[T]:
    """Every item once, those of the first list first."""
    return list(dict.fromkeys(item for items in lists for item in items))
