"""Signal to quantization noise ratios."""

from __future__ import annotations

import math

import pytest
import torch

from fxquant.numerics.sqnr import sqnr_db


@pytest.mark.parametrize(
    ("value", "expected"), [(math.inf, -math.inf), (-math.inf, -math.inf), (math.nan, math.nan), (1.0, math.inf)]
)
def test_values_that_are_not_finite(value: float, expected: float) -> None:
    exact = torch.ones(4)
    found = sqnr_db(exact, torch.tensor([1.0, 1.0, 1.0, value]))
    assert found == expected or (math.isnan(found) and math.isnan(expected))


def test_the_ratio_of_energies() -> None:
    assert sqnr_db(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])) == pytest.approx(20.0)
    assert sqnr_db(torch.zeros(2), torch.ones(2)) == -math.inf
