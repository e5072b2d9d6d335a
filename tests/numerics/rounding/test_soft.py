"""Soft roundings start at the weight, end at codes, and are driven there."""

from __future__ import annotations

import pytest
import torch

from fxquant.errors import ConfigurationError
from fxquant.numerics.rounding.soft import Hardening, SoftWeight
from fxquant.numerics.weights import quantize_weight, weight_scales


def soft(bits: int = 4, group: int = 0) -> tuple[torch.Tensor, SoftWeight]:
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    grid = weight_scales(weight, format=f"int{bits}", group_size=group)
    return weight, SoftWeight(weight, grid, f"int{bits}", group)


@pytest.mark.parametrize("group", [0, 8])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_it_starts_at_the_weight_and_rounds_to_nearest(bits: int, group: int) -> None:
    weight, made = soft(bits, group)
    steps = made.scale.repeat_interleave(16 // made.scale.shape[1], dim=1)
    inside = (made.hard().codes() > 0) & (made.hard().codes() < 2**bits - 1)
    assert ((made() - weight).abs() / steps)[inside].max() < 1e-3
    nearest = quantize_weight(weight, bits=bits, group_size=group)
    assert torch.equal(made.hard().codes(), nearest.codes())
    torch.testing.assert_close(made.nearest(), nearest.dequantize(torch.float32))


def test_codes_are_the_ones_below_or_above() -> None:
    _, made = soft()
    lowest = made.hard().codes().int() - (made.up().detach().flatten(1) >= 0.5).int()
    with torch.no_grad():
        made.v.fill_(10.0)
    assert torch.equal(made.up(), torch.ones_like(made.v))
    assert torch.equal(made.hard().codes().int(), (lowest + 1).clamp(0, 15))
    torch.testing.assert_close(made(), made.hard().dequantize(torch.float32))
    with torch.no_grad():
        made.v.fill_(-10.0)
    assert torch.equal(made.hard().codes().int(), lowest.clamp(min=0))


def test_the_regularizer_is_least_at_codes() -> None:
    _, made = soft()
    assert made.undecided(2.0) > 0
    with torch.no_grad():
        made.v.copy_(torch.where(made.v > 0, 10.0, -10.0))
    assert made.undecided(2.0) == 0


def test_the_exponent_falls_after_the_warm_up() -> None:
    schedule = Hardening(iterations=100, weight=1.0)
    assert schedule.exponent(19) is None
    assert schedule.exponent(20) == 20.0
    assert schedule.exponent(60) == 11.0
    assert 2.0 < schedule.exponent(99) < 2.3


@pytest.mark.parametrize("options", [{"iterations": 0}, {"weight": 0.0}, {"warm_up": 1.0}])
def test_bad_schedules_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError):
        Hardening(**({"iterations": 10, "weight": 1.0} | options))
