"""The factor of moments of few rows against the factor of the matrix."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fxquant.errors import NonFiniteError
from fxquant.numerics.rounding.feedback import BLOCK, ErrorFeedback
from fxquant.numerics.rounding.gptq import gptq


def few(count: int, channels: int, seed: int = 0) -> Tensor:
    """X ``[count, channels]`` with channels of very different size, some of them never seen."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, channels, generator=generator, dtype=torch.float64)
    rows = rows * torch.logspace(-3, 1, channels, dtype=torch.float64)[torch.randperm(channels, generator=generator)]
    rows[:, [0, channels // 2, channels - 1]] = 0
    return rows / count**0.5


@pytest.mark.parametrize("activation_order", [True, False])
@pytest.mark.parametrize("damping", [1.0, 0.01, 1e-4])
@pytest.mark.parametrize(("count", "channels"), [(1, 5), (3, BLOCK), (7, BLOCK + 1), (60, 3 * BLOCK + 17), (90, 100)])
def test_is_that_of_the_matrix(count: int, channels: int, damping: float, activation_order: bool) -> None:
    rows = few(count, channels)
    found = ErrorFeedback.of_rows(rows, damping, activation_order)
    expected = ErrorFeedback.of(rows.T @ rows, damping, activation_order)
    assert torch.equal(found.order, expected.order)
    torch.testing.assert_close(found.importance, expected.importance)
    factor, reference = found.factor.whole(), expected.factor.whole()
    assert factor.dtype == torch.float32 and torch.equal(factor, factor.triu())
    # Each row, relative to its diagonal: that is how columns are corrected. Sums in float32 lose what damping leaves.
    diagonal, lost = reference.diagonal()[:, None], 1e-5 + 1e-7 / damping
    torch.testing.assert_close(factor / diagonal, reference / diagonal, rtol=1e-4, atol=lost)
    torch.testing.assert_close(factor.diagonal(), reference.diagonal(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("group_size", [0, 16])
@pytest.mark.parametrize("format", ["int4", "mxfp4"])
def test_rounds_as_the_matrix_does(format: str, group_size: int) -> None:
    if format == "mxfp4":
        group_size = 32
    rows, channels = few(40, 2 * BLOCK + 64), 2 * BLOCK + 64
    weight = torch.randn(48, channels, generator=torch.Generator().manual_seed(1))
    made = [
        gptq(weight, feedback, format=format, group_size=group_size).dequantize(torch.float64)
        for feedback in (ErrorFeedback.of_rows(rows), ErrorFeedback.of(rows.T @ rows))
    ]
    # In float32, a value halfway between two codes may go the other way, which all later columns then compensate.
    assert (made[0] != made[1]).double().mean() < 0.02
    errors = [float((((one - weight) @ rows.T) ** 2).sum()) for one in made]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


@pytest.mark.parametrize("way", [ErrorFeedback.of_rows, lambda rows: ErrorFeedback.of(rows.T @ rows)])
@pytest.mark.parametrize("largest", [2.0**-120, 2.0**-60, 2.0**-20, 2.0**60, 2.0**500])
def test_only_ratios_count(largest: float, way: Callable[[Tensor], ErrorFeedback]) -> None:
    """Also beside channels that were never seen, which are no part of the mean."""
    rows, weight = few(5, 43), torch.randn(8, 43, generator=torch.Generator().manual_seed(1))
    seen = rows.abs().sum(0) > 0
    scaled = way(rows * largest)
    assert scaled.importance.isfinite().all() and float(scaled.importance.max()) > 0
    ours, expected = (gptq(weight, one, format="int4").codes() for one in (scaled, way(rows)))
    assert torch.equal(ours, expected)
    extremes = torch.stack([weight.amin(1), weight.amax(1)], 1)  # So that the grid is the same without the others.
    alone = torch.cat([weight[:, seen], extremes], 1), torch.cat([rows[:, seen], torch.zeros(5, 2)], 1)
    assert torch.equal(gptq(alone[0], way(alone[1]), format="int4").codes()[:, :-2], ours[:, seen])


def test_channels_that_were_never_seen_are_rounded_to_nearest() -> None:
    rows, weight = torch.zeros(3, 40), torch.randn(8, 40, generator=torch.Generator().manual_seed(1))
    nothing = gptq(weight, ErrorFeedback.of_rows(rows), format="int4")
    alone = gptq(weight, ErrorFeedback.of(torch.eye(40)), format="int4")
    assert torch.equal(nothing.codes(), alone.codes())


def test_rows_that_cannot_be_used() -> None:
    rows = few(3, 40)
    rows[1, 2] = torch.nan
    with pytest.raises(NonFiniteError, match="NaN"):
        ErrorFeedback.of_rows(rows)
    with pytest.raises(NonFiniteError, match="round this layer to nearest"):
        ErrorFeedback.of_rows(few(3, 40), damping=0.0)  # The matrix has rank 3.


def test_without_damping_as_many_rows_as_channels_that_were_seen_are_enough() -> None:
    rows, weight = torch.zeros(4, 40), torch.randn(8, 40, generator=torch.Generator().manual_seed(1))
    rows[:, [3, 8, 30]] = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    for x in (rows, torch.zeros(4, 40)):
        expected = ErrorFeedback.of((x.T @ x).double(), damping=0.0)
        ours, theirs = (gptq(weight, one, format="int4") for one in (ErrorFeedback.of_rows(x, 0.0), expected))
        assert torch.equal(ours.codes(), theirs.codes())
