"""AdaRound on second moments: against all roundings there are, and against rounding to nearest."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fxquant.errors import ConfigurationError, NonFiniteError
from fxquant.numerics.rounding.adaround import adaround
from fxquant.numerics.rounding.soft import Hardening
from fxquant.numerics.weights import quantize_weight, weight_scales


def moments_of(channels: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    x = torch.randn(4 * channels, channels, generator=generator, dtype=torch.float64) @ mix
    return x.T @ x / len(x)


def weight_of(rows: int, channels: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed))


def error(weight: Tensor, rounded: Tensor, moments: Tensor) -> Tensor:
    """Of each row's output."""
    difference = weight.double() - rounded.double()
    return ((difference @ moments) * difference).sum(dim=1)


def test_it_comes_close_to_the_best_of_all_roundings() -> None:
    moments, weight = moments_of(8), weight_of(20, 8)
    grid = weight_scales(weight, format="int3")
    scale, zero = grid.scale, grid.zero_point
    assert zero is not None
    below = (weight / scale).floor()
    ups = torch.tensor(list(itertools.product([0.0, 1.0], repeat=8)))
    every = torch.stack([error(weight, ((below + up + zero).clamp(0, 7) - zero) * scale, moments) for up in ups])
    learned = error(weight, adaround(weight, moments, format="int3").dequantize(torch.float32), moments)
    nearest = error(weight, quantize_weight(weight, bits=3).dequantize(torch.float32), moments)
    best = every.amin(dim=0)
    assert (learned >= best - 1e-5).all()  # It is one of these roundings.
    assert best.sum() < learned.sum() < 1.3 * best.sum() < nearest.sum()


@pytest.mark.parametrize("group", [0, 16])
@pytest.mark.parametrize("bits", [2, 4])
def test_it_errs_less_than_nearest(bits: int, group: int) -> None:
    moments, weight = moments_of(64), weight_of(32, 64)
    learned = adaround(weight, moments, format=f"int{bits}", group_size=group)
    nearest = quantize_weight(weight, bits=bits, group_size=group)
    assert torch.equal(learned.scale, nearest.scale)
    assert (learned.codes().int() - nearest.codes().int()).abs().max() == 1
    errors = [error(weight, one.dequantize(torch.float32), moments).sum() for one in (learned, nearest)]
    assert errors[0] < 0.8 * errors[1]


def test_where_nearest_is_best_it_stays() -> None:
    weight = weight_of(8, 16)
    learned = adaround(weight, torch.eye(16), format="int4")
    assert torch.equal(learned.codes(), quantize_weight(weight, bits=4).codes())
    whole = torch.randint(0, 16, (8, 16), generator=torch.Generator().manual_seed(2)).float()
    whole[:, 0], whole[:, 1] = 0.0, 15.0  # The grid is that of the whole numbers, and nothing is lost.
    assert torch.equal(adaround(whole, torch.eye(16), format="int4").dequantize(torch.float32), whole)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="16 input channels was given moments of shape"):
        adaround(weight_of(8, 16), torch.eye(8), format="int4")
    with pytest.raises(NonFiniteError):
        adaround(weight_of(8, 16), torch.full((16, 16), torch.nan), format="int4")


def test_moments_that_float32_does_not_hold() -> None:
    moments, weight = moments_of(8), weight_of(4, 8)
    few = Hardening(iterations=20, weight=10.0)
    expected = adaround(weight, moments, format="int3", hardening=few)
    large = adaround(weight, moments * 2.0**200, format="int3", hardening=few)
    assert torch.equal(large.codes(), expected.codes())
