"""Samples hold every value, or every pair of values, and no combination is lost."""

from __future__ import annotations

import itertools

import pytest

from tests.sampling import covering

AXES = ("abc", (1, 2), (True, False, None, 0.5))


@pytest.mark.parametrize(("together", "number"), [(1, 4), (2, 12)])
def test_every_value_or_pair_occurs(together: int, number: int) -> None:
    made = covering(*AXES, together=together)
    assert [param.values for param in made] == [*itertools.product(*AXES)]
    sample = [param.values for param in made if not param.marks]
    assert len(sample) == number
    for chosen in itertools.combinations(range(3), together):
        wanted = set(itertools.product(*(AXES[axis] for axis in chosen)))
        assert {tuple(values[axis] for axis in chosen) for values in sample} == wanted


def test_a_tuple_is_several_parameters() -> None:
    assert [param.values for param in covering([(1, 2), (3, 4)], [5])] == [(1, 2, 5), (3, 4, 5)]
