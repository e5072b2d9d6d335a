"""GPTQ against its definition, column by column in float64, and against rounding to nearest."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from fxquant.errors import ConfigurationError, NonFiniteError
from fxquant.numerics.formats import Integer
from fxquant.numerics.grids import affine_parameters
from fxquant.numerics.ranges import weight_range
from fxquant.numerics.rounding.feedback import ErrorFeedback
from fxquant.numerics.rounding.gptq import gptq
from fxquant.numerics.weights import quantize_weight


def correlated(channels: int, seed: int = 0, rows: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(channels, channels, generator=generator, dtype=torch.float64) / channels**0.5
    x = torch.randn(rows or 4 * channels, channels, generator=generator, dtype=torch.float64) @ mix
    return x * torch.rand(channels, generator=generator, dtype=torch.float64).add(0.05)


def moments_of(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def output_error(weight: Tensor, rounded: Tensor, moments: Tensor) -> float:
    difference = weight.double() - rounded.double()
    return float(((difference @ moments) * difference).sum())


def by_definition(weight: Tensor, moments: Tensor, bits: int, group: int, order: Tensor, damping: float) -> Tensor:
    """Optimal brain quantization in a fixed order, inverting what is left of the moments anew for each column."""
    w, n = weight.double().clone(), weight.shape[1]
    size = group or n
    grids = [
        affine_parameters(*weight_range(piece.contiguous(), Integer(bits), "minmax"), bits)
        for piece in weight.split(size, 1)
    ]
    damped = moments + damping * moments.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    result = torch.empty_like(w)
    for position, column in enumerate(order.tolist()):
        left = order[position:]
        inverse = torch.linalg.inv(damped[left][:, left])
        scale, zero = (side.double() for side in grids[column // size])
        code = (w[:, column] / scale).round().add(zero).clamp(0, 2**bits - 1)
        result[:, column] = (code - zero) * scale
        error = (w[:, column] - result[:, column]) / inverse[0, 0]
        w[:, left] -= error[:, None] * inverse[0]
    return result


@pytest.mark.parametrize("group", [0, 8])
@pytest.mark.parametrize("activation_order", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_is_what_its_definition_says(bits, activation_order, group):
    moments = moments_of(correlated(24))
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(1))
    feedback = ErrorFeedback.of(moments, 0.01, activation_order)
    got = gptq(weight, feedback, format=f"int{bits}", group_size=group).dequantize(torch.float64)
    expected = by_definition(weight, moments, bits, group, feedback.order, 0.01)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert activation_order == (feedback.order.tolist() != list(range(24)))


@pytest.mark.parametrize("channels", [24, 64, 150])
@pytest.mark.parametrize("bits", [3, 4])
def test_costs_the_output_less_than_rounding_to_nearest(channels, bits):
    # Over many layers: each step is the best one, but not their sum, so that a single row can come out worse.
    ours = theirs = 0.0
    for seed in range(20):
        moments = moments_of(correlated(channels, seed))
        weight = torch.randn(16, channels, generator=torch.Generator().manual_seed(seed))
        rounded = gptq(weight, ErrorFeedback.of(moments, 1e-4), format=f"int{bits}")
        nearest = quantize_weight(weight, bits=bits)
        assert torch.equal(rounded.scale, nearest.scale) and torch.equal(rounded.zero_point, nearest.zero_point)
        ours += output_error(weight, rounded.dequantize(torch.float64), moments)
        theirs += output_error(weight, nearest.dequantize(torch.float64), moments)
    assert ours < 0.8 * theirs


def test_uncorrelated_inputs_are_rounded_to_nearest():
    weight = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    moments = torch.diag(torch.rand(12, dtype=torch.float64) + 0.1)
    assert torch.equal(
        gptq(weight, ErrorFeedback.of(moments), format="int4").packed, quantize_weight(weight, bits=4).packed
    )


def test_dead_channels_are_rounded_to_nearest_and_disturb_nobody():
    x = correlated(20)
    x[:, [3, 11]] = 0
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    got, nearest = gptq(weight, ErrorFeedback.of(moments_of(x)), format="int4"), quantize_weight(weight, bits=4)
    assert torch.equal(got.codes()[:, [3, 11]], nearest.codes()[:, [3, 11]])


def test_fewer_rows_than_channels_are_enough():
    x = correlated(64, rows=10)
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    rounded = gptq(weight, ErrorFeedback.of(moments_of(x)), format="int4")
    nearest = quantize_weight(weight, bits=4)
    ours, theirs = (output_error(weight, q.dequantize(torch.float64), moments_of(x)) for q in (rounded, nearest))
    assert ours < 0.2 * theirs


def test_damping_grows_until_the_moments_can_be_factorized():
    # The least eigenvalue is -0.5 of the mean: 0.01 and 0.1 are too little, 1 is enough.
    basis, _ = torch.linalg.qr(torch.randn(30, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    values = torch.linspace(-0.5, 2.5, 30, dtype=torch.float64)
    moments = basis @ torch.diag(values) @ basis.T
    moments = (moments + moments.T) / 2
    found = ErrorFeedback.of(moments, 0.01)
    damped = moments + moments.diagonal().mean() * torch.eye(30, dtype=torch.float64)
    expected = torch.linalg.inv(damped[found.order][:, found.order])
    factor = found.factor.whole().double()
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor, expected, rtol=1e-5, atol=1e-5)


def test_moments_that_cannot_be_used():
    broken = torch.eye(4)
    broken[1, 2] = torch.nan
    with pytest.raises(NonFiniteError, match="NaN"):
        ErrorFeedback.of(broken)
    with pytest.raises(NonFiniteError, match="round this layer to nearest"):
        ErrorFeedback.of(torch.tensor([[1.0, 1e9], [1e9, 1.0]]))
    with pytest.raises(ConfigurationError, match="5 input channels"):
        gptq(torch.ones(2, 5), ErrorFeedback.of(torch.eye(4)), format="int4")
    with pytest.raises(ConfigurationError, match="divide"):
        gptq(torch.ones(2, 4), ErrorFeedback.of(torch.eye(4)), format="int4", group_size=3)


@pytest.mark.parametrize("largest", [1e18, 1e30])
def test_moments_that_float32_does_not_hold(largest):
    """Their ratios decide: as with the same moments divided by a number."""
    x = correlated(24)
    x[0] *= largest
    moments, weight = moments_of(x), torch.randn(16, 24, generator=torch.Generator().manual_seed(1))
    feedback = ErrorFeedback.of(moments)
    assert torch.isfinite(feedback.importance).all()
    expected = gptq(weight, ErrorFeedback.of(moments / largest**2), format="int4", method="mse")
    assert torch.equal(gptq(weight, feedback, format="int4", method="mse").codes(), expected.codes())


@pytest.mark.parametrize("activation_order", [True, False])
def test_factors_in_the_memory_of_the_moments_are_the_same(activation_order: bool) -> None:
    x = torch.randn(200, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:, 5:9] = 0
    moments = x.T @ x / len(x)
    before = moments.clone()
    found = ErrorFeedback.of(moments, activation_order=activation_order)
    assert torch.equal(moments, before)
    again = ErrorFeedback.of(moments, activation_order=activation_order, overwrite=True)
    assert torch.equal(again.factor.whole(), found.factor.whole()) and torch.equal(again.order, found.order)
    assert torch.equal(found.factor.whole(), found.factor.whole().triu()) and not torch.equal(moments, before)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems free it with the moments")
def test_the_memory_of_the_moments_is_given_back_while_the_factor_is_made() -> None:
    moments = torch.eye(1024, dtype=torch.float64) + 0.01
    found = ErrorFeedback.of(moments, overwrite=True)
    assert moments.count_nonzero() < 0.01 * moments.numel()  # Pages that the system took back hold zeros.
    assert torch.equal(found.factor.whole(), found.factor.whole().triu()) and found.factor.whole().isfinite().all()
