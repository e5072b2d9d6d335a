from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.errors import CalibrationError, ConfigurationError
from fxquant.planning.grouping import best_segments, check_groups, cut, merge_neighbours, within


def vectors(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, 3)).cumsum(axis=0) + 100


def merged_by_hand(points: np.ndarray, groups: int) -> list[int]:
    """The definition: lists of positions, merged by the distance of their means."""
    found = [[i] for i in range(len(points))]
    while len(found) > groups:
        means = [points[group].mean(axis=0) for group in found]
        closest = min(range(len(found) - 1), key=lambda i: ((means[i] - means[i + 1]) ** 2).sum())
        found[closest : closest + 2] = [found[closest] + found[closest + 1]]
    return [group[0] for group in found]


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 12), st.integers(0, 2**16), st.data())
def test_groups_are_what_their_definitions_say(count, seed, data):
    points = vectors(count, seed)
    groups = data.draw(st.integers(1, count))
    greedy = cut(merge_neighbours(points), count, groups)
    assert greedy == merged_by_hand(points, groups)
    optimal = best_segments(points, groups)
    assert len(optimal) == len(greedy) == groups and optimal[0] == 0
    least = min(within(points, [0, *starts]) for starts in combinations(range(1, count), groups - 1))
    assert within(points, optimal) == pytest.approx(least, abs=1e-6)
    assert within(points, greedy) >= least - 1e-6


def test_the_dendrogram_is_a_hierarchy_of_neighbours():
    merges = merge_neighbours(vectors(20, 1))
    assert len(merges) == 19 and sorted(merge.right for merge in merges) == list(range(1, 20))
    for groups in range(1, 20):
        assert set(cut(merges, 20, groups)) < set(cut(merges, 20, groups + 1))


def test_how_many_groups():
    assert [check_groups(0, count) for count in (2, 10, 11, 100)] == [1, 1, 2, 10]
    assert check_groups(7, 7) == 7
    with pytest.raises(ConfigurationError, match=r"8 groups.*saw 7"):
        check_groups(8, 7)
    with pytest.raises(CalibrationError, match="one timestep only"):
        check_groups(1, 1)
