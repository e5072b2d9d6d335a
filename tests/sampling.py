"""Samples of the product of several lists of values; the rest is exhaustive."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def covering(*axes: Sequence[Any], together: int = 2) -> list[Any]:
    """All combinations of values, one of each axis, as parameters of a test.

    `make test` runs a sample in which any values of so many axes occur together; the other combinations are marked as
    exhaustive. A tuple is the values of several parameters.

    Args:
        axes: The values of each axis.
        together: 1 if every value occurs, 2 if every pair of values of two axes does.
    """
    places = [*itertools.product(*(range(len(axis)) for axis in axes))]
    parts = {place: set(itertools.combinations(enumerate(place), together)) for place in places}
    missing, chosen = set[Any]().union(*parts.values()), set()
    while missing:
        best = max(places, key=lambda place: len(parts[place] & missing))
        chosen.add(best)
        missing -= parts[best]
    made = []
    for place in places:
        values = [axis[number] for axis, number in zip(axes, place, strict=True)]
        flat = [item for value in values for item in (value if isinstance(value, tuple) else (value,))]
        marks = () if place in chosen else (pytest.mark.exhaustive,)
        made.append(pytest.param(*flat, marks=marks, id="-".join(map(str, flat))))
    return made
