"""Second moments and rows of inputs that passes transformed, without a matrix of the transform."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxquant.planning.context import PassContext
from fxquant.planning.decisions import LayerPlan
from fxquant.planning.input_transforms import linear, transformed_moments
from fxquant.planning.layer_inputs import moment_rows, moments
from fxquant.planning.plan import Plan
from fxquant.statistics.collection import Statistics
from fxquant.statistics.moments import SecondMoments


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("channels", [300, 200, 600])
def test_moments_are_those_of_the_transformed_rows(channels: int) -> None:
    """More, fewer or as many channels as before, and no multiple of the rows that are transformed at a time."""
    x, matrix, found = draw(20, 300), draw(300, channels, seed=1), SecondMoments(300)
    found.add(x, 1.0)
    sizes: list[int] = []

    def turned(rows: Tensor) -> Tensor:
        sizes.append(len(rows))
        return rows.flip(1) @ matrix

    got, expected = transformed_moments(found, [turned, lambda rows: rows * 2], shifts=False), 2 * x.flip(1) @ matrix
    assert got is not None and max(sizes) < 300
    torch.testing.assert_close(got, expected.T @ expected / 20, rtol=1e-6, atol=1e-2)
    assert transformed_moments(found, [turned], shifts=True) is None


@pytest.mark.parametrize(
    "function",
    [torch.relu, lambda rows: rows + 1, lambda rows: rows - rows.mean(0), lambda rows: rows.sum(1), torch.round],
)
def test_functions_that_are_not_linear(function: object) -> None:
    assert linear([lambda rows: rows * 2, function], 6) is None  # type: ignore[list-item]


def test_no_more_rows_than_are_few_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows are transformed row by row; of others, only the number is looked at."""
    plan, statistics = Plan("", "", "timestep"), Statistics()
    statistics.wants_moments = {"few", "many"}.__contains__
    for name, count in (("few", 75), ("many", 76)):
        plan.layers[name] = LayerPlan("linear", "block", [4, 300], 4, 8)
        statistics.record(name, draw(1, count, 300).bfloat16(), torch.tensor(1.0))
    context, matrix, sizes = PassContext(plan, statistics), draw(300, 300, seed=1), []
    expected = moments(context, "few")
    got = moment_rows(context, "few", 4)
    assert expected is not None and got is not None
    torch.testing.assert_close(got.T @ got, expected, rtol=1e-5, atol=1e-5)

    def turned(rows: Tensor) -> Tensor:
        sizes.append(len(rows))
        return rows @ matrix

    context.transform_input("few", turned)
    torch.testing.assert_close(moment_rows(context, "few", 4), got @ matrix, rtol=1e-12, atol=1e-12)
    assert max(sizes) == 75
    monkeypatch.setattr(SecondMoments, "rows", None)
    assert moment_rows(context, "many", 4) is None
