"""Grids cover what they should, searches find what brute force finds, and fake weights are never looked at."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fxquant.errors import ConfigurationError, NonFiniteError
from fxquant.numerics.finite import require_finite
from fxquant.numerics.formats import Integer
from fxquant.numerics.grids import affine_parameters, fake_quantize
from fxquant.numerics.packing import packed_size
from fxquant.numerics.ranges import PERCENTILES, RangeMethod, activation_range, weight_range
from fxquant.numerics.sqnr import sqnr_db
from fxquant.numerics.weights import QuantizedWeight, quantize_weight

METHODS: tuple[RangeMethod, ...] = ("minmax", "percentile", "mse")
FLOATS = st.floats(-(2.0**127), 2.0**127, width=32)


def mean_squared_error(samples: Tensor, lo: float, hi: float, bits: int) -> float:
    scale, zero_point = affine_parameters(lo, hi, bits)
    exact = samples.double()
    return (exact - fake_quantize(exact, scale, zero_point, bits)).square().mean().item()


def heavy_tailed(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    normal, tail = torch.randn(2, *shape, generator=generator)
    return normal * tail.abs().pow(2) + 0.3


class TestAffineParameters:
    @given(a=FLOATS, b=FLOATS, bits=st.integers(2, 8), symmetric=st.booleans())
    @settings(deadline=None)
    def test_covers_the_range_to_half_a_step(self, a: float, b: float, bits: int, symmetric: bool) -> None:
        lo, hi = min(a, b), max(a, b)
        scale, zero_point = affine_parameters(lo, hi, bits, symmetric)
        assert scale.dtype == torch.float32 and zero_point.dtype == torch.uint8
        assert math.isfinite(scale.item()) and scale.item() > 0.0
        ends = torch.tensor([lo, 0.0, hi], dtype=torch.float64)
        error = (fake_quantize(ends, scale, zero_point, bits) - ends).abs()
        assert error[1] == 0.0
        assert error.max().item() <= scale.item() * (0.5 + 1e-4)
        if symmetric:
            assert zero_point.item() == 2 ** (bits - 1)

    @pytest.mark.parametrize("symmetric", [False, True])
    @pytest.mark.parametrize(("lo", "hi"), [(0.0, 0.0), (0.0, 1e-45), (-1e-45, 0.0), (-1e-40, 1e-40), (1e-300, 1e-300)])
    def test_degenerate_ranges_give_a_usable_scale(self, lo: float, hi: float, symmetric: bool) -> None:
        scale, zero_point = affine_parameters(lo, hi, 8, symmetric)
        assert scale.item() >= torch.finfo(torch.float32).tiny
        assert math.isfinite(1.0 / scale.item())
        assert fake_quantize(torch.zeros(()), scale, zero_point, 8).item() == 0.0

    def test_known_grids(self) -> None:
        scale, zero_point = affine_parameters(torch.tensor([-1.0, 2.0, -3.0]), torch.tensor([2.0, 3.0, -1.0]), 2)
        torch.testing.assert_close(scale, torch.tensor([1.0, 1.0, 1.0]))
        assert zero_point.tolist() == [1, 0, 3]
        # Codes 0..3 around 2 are the integers -2..1.
        scale, zero_point = affine_parameters(-2.0, 0.5, 2, symmetric=True)
        assert (scale.item(), zero_point.item()) == (1.0, 2)

    def test_halves_round_to_even(self) -> None:
        x = torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5])
        rounded = fake_quantize(x, torch.tensor(1.0), torch.tensor(8, dtype=torch.uint8), 4)
        assert rounded.tolist() == [-2.0, 0.0, 0.0, 2.0, 2.0]

    def test_keeps_the_dtype(self) -> None:
        scale, zero_point = affine_parameters(-1.0, 1.0, 8)
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            assert fake_quantize(torch.ones(3, dtype=dtype), scale, zero_point, 8).dtype == dtype


class TestActivationRange:
    def test_minmax_needs_no_samples(self) -> None:
        assert activation_range(torch.empty(0), -1.0, 2.0, Integer(8), "minmax") == (-1.0, 2.0)
        assert activation_range(torch.empty(0), 1.0, 2.0, Integer(8), "minmax") == (0.0, 2.0)

    @pytest.mark.parametrize("bits", [3, 4, 8])
    def test_percentile_is_the_best_of_the_four(self, bits: int) -> None:
        samples = heavy_tailed(20_000)
        lo, hi = samples.min().item(), samples.max().item()
        exact = samples.double()
        candidates = [(lo, hi)] + [
            (torch.quantile(exact, 1 - share).item(), torch.quantile(exact, share).item()) for share in PERCENTILES
        ]
        best = min(candidates, key=lambda ends: mean_squared_error(samples, *ends, bits))
        assert activation_range(samples, lo, hi, Integer(bits), "percentile") == pytest.approx(best, rel=1e-6)

    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_mse_is_what_brute_force_finds(self, bits: int) -> None:
        samples = heavy_tailed(40, 50)
        lo, hi = samples.min().item(), samples.max().item()
        found = activation_range(samples, lo, hi, Integer(bits), "mse")
        factors = torch.linspace(1.0, 0.05, 39, dtype=torch.float64).tolist()
        errors = [mean_squared_error(samples, lo * a, hi * b, bits) for a in factors for b in factors]
        assert mean_squared_error(samples, *found, bits) == pytest.approx(min(errors), rel=1e-9)

    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_searching_more_is_never_worse(self, bits: int) -> None:
        samples = heavy_tailed(5_000)
        lo, hi = samples.min().item(), samples.max().item()
        whole, percentile, mse = (
            mean_squared_error(samples, *activation_range(samples, lo, hi, Integer(bits), method), bits)
            for method in METHODS
        )
        assert percentile <= whole and mse <= whole

    def test_ends_of_one_sign_and_constants(self) -> None:
        samples = torch.rand(100) + 1.0
        for method in METHODS:
            lo, hi = activation_range(samples, 1.0, 2.0, Integer(8), method)
            assert lo == 0.0 and 0.0 < hi <= 2.0
            assert activation_range(torch.zeros(10), 0.0, 0.0, Integer(8), method) == (0.0, 0.0)
            assert activation_range(torch.ones(1), 1.0, 1.0, Integer(8), method) == (0.0, 1.0)

    def test_an_outlier_that_the_samples_missed_can_be_clipped(self) -> None:
        samples = torch.linspace(-1.0, 1.0, 1001)
        assert activation_range(samples, -1.0, 50.0, Integer(4), "percentile")[1] < 2.0
        assert activation_range(samples, -1.0, 50.0, Integer(4), "minmax")[1] == 50.0

    def test_bad_input(self) -> None:
        with pytest.raises(ConfigurationError, match="needs samples, but got none"):
            activation_range(torch.empty(0), -1.0, 1.0, Integer(8), "mse")
        with pytest.raises(ConfigurationError, match=r"'best'.*minmax, percentile, mse"):
            activation_range(torch.ones(3), -1.0, 1.0, Integer(8), "best")  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match="bits=1"):
            activation_range(torch.ones(3), -1.0, 1.0, Integer(1), "minmax")


class TestWeightRange:
    def test_percentile_agrees_with_quantiles(self) -> None:
        rows = heavy_tailed(6, 3000)
        found = weight_range(rows, Integer(3), "percentile")
        exact = rows.double()
        for row, lo, hi in zip(exact, *found, strict=True):
            candidates = [(row.min().item(), row.max().item())] + [
                (torch.quantile(row, 1 - share).item(), torch.quantile(row, share).item()) for share in PERCENTILES
            ]
            best = min(candidates, key=lambda ends: mean_squared_error(row, *ends, 3))
            assert (lo.item(), hi.item()) == pytest.approx(best, rel=1e-6)

    @pytest.mark.parametrize("symmetric", [False, True])
    @pytest.mark.parametrize("method", ["percentile", "mse"])
    def test_searches_never_lose_to_minmax_in_any_row(self, method: RangeMethod, symmetric: bool) -> None:
        rows = heavy_tailed(32, 200)
        errors = []
        for each in ("minmax", method):
            scale, zero_point = affine_parameters(*weight_range(rows, Integer(4), each, symmetric), 4, symmetric)
            approximation = fake_quantize(rows, scale[:, None], zero_point[:, None], 4)
            errors.append((approximation - rows).square().sum(1))
        assert (errors[1] <= errors[0]).all()
        assert errors[1].sum() < errors[0].sum()

    @pytest.mark.parametrize("method", METHODS)
    def test_slices_of_rows_change_nothing(self, method: RangeMethod) -> None:
        rows = heavy_tailed(60, 6000)
        whole = weight_range(rows, Integer(4), method)
        parts = [weight_range(part, Integer(4), method) for part in rows.split(25)]
        for i in range(2):
            assert torch.equal(whole[i], torch.cat([part[i] for part in parts]))

    @pytest.mark.parametrize("method", METHODS)
    def test_rows_of_one_value(self, method: RangeMethod) -> None:
        lo, hi = weight_range(torch.tensor([[2.0], [0.0]]), Integer(4), method)
        assert (lo.tolist(), hi.tolist()) == ([2.0, 0.0], [2.0, 0.0])


class TestQuantizeWeight:
    @given(
        bits=st.integers(2, 8),
        group_size=st.sampled_from([0, 1, 6, 8, 24]),
        symmetric=st.booleans(),
        method=st.sampled_from(METHODS),
        seed=st.integers(0, 1000),
    )
    @settings(deadline=None, max_examples=60)
    def test_is_rounding_to_the_nearest_code_of_each_group(
        self, bits: int, group_size: int, symmetric: bool, method: RangeMethod, seed: int
    ) -> None:
        weight = torch.randn(5, 24, generator=torch.Generator().manual_seed(seed))
        quantized = quantize_weight(weight, bits=bits, group_size=group_size, symmetric=symmetric, method=method)
        width = group_size or 24
        assert quantized.packed.shape == (5, packed_size(24, bits))
        assert quantized.scale.shape == quantized.zero_point.shape == (5, 24 // width)
        assert (quantized.scale.dtype, quantized.zero_point.dtype) == (torch.float32, torch.uint8)
        scale = quantized.scale.repeat_interleave(width, 1)
        zero_point = quantized.zero_point.repeat_interleave(width, 1)
        assert torch.equal(quantized.dequantize(torch.float32), fake_quantize(weight, scale, zero_point, bits))
        if method == "minmax":
            error = (quantized.dequantize(torch.float64) - weight.double()).abs()
            assert (error <= scale.double() * (0.5 + 1e-4)).all()

    def test_eight_bits_are_close_and_four_are_coarser(self) -> None:
        weight = torch.randn(64, 256)
        at_8, at_4, grouped = (
            sqnr_db(weight, quantize_weight(weight, bits=bits, group_size=size).dequantize(torch.float32))
            for bits, size in ((8, 0), (4, 0), (4, 64))
        )
        assert at_8 > 40.0 > grouped > at_4 > 15.0

    def test_zero_and_constant_rows_survive(self) -> None:
        weight = torch.tensor([[0.0, 0.0], [3.0, 3.0], [-3.0, -3.0]])
        assert torch.equal(quantize_weight(weight, bits=4).dequantize(torch.float32), weight)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_dtypes(self, dtype: torch.dtype) -> None:
        weight = torch.randn(4, 16).to(dtype)
        for method in METHODS:
            approximation = quantize_weight(weight, bits=8, method=method).dequantize(dtype)
            assert approximation.dtype == dtype
            assert sqnr_db(weight, approximation) > 30.0

    def test_codes_round_trip_through_from_codes(self) -> None:
        first = quantize_weight(torch.randn(4, 12), bits=3, group_size=4)
        again = QuantizedWeight.from_codes(first.codes(), first.scales, format="int3", group_size=4)
        assert torch.equal(again.packed, first.packed)
        assert again.in_features == 12

    def test_parameters_need_not_be_detached(self) -> None:
        quantized = quantize_weight(torch.nn.Parameter(torch.randn(4, 8)), bits=4, method="mse")
        assert not quantized.scale.requires_grad

    @pytest.mark.parametrize("method", METHODS)
    def test_runs_without_values(self, method: RangeMethod) -> None:
        expected = quantize_weight(torch.randn(6, 30), bits=3, group_size=10, method=method)
        with FakeTensorMode():
            fake = quantize_weight(torch.empty(6, 30), bits=3, group_size=10, method=method)
            assert fake.dequantize(torch.float16).shape == (6, 30)
        on_meta = quantize_weight(torch.empty(6, 30, device="meta"), bits=3, group_size=10, method=method)
        for name in ("packed", "scale", "zero_point"):
            real = getattr(expected, name)
            for other in (getattr(fake, name), getattr(on_meta, name)):
                assert (other.shape, other.dtype, other.stride()) == (real.shape, real.dtype, real.stride())

    def test_bad_input(self) -> None:
        weight = torch.randn(4, 10)
        with pytest.raises(ConfigurationError, match=r"group_size=4 .* 10 input"):
            quantize_weight(weight, bits=4, group_size=4)
        with pytest.raises(ConfigurationError, match="group_size=-1"):
            quantize_weight(weight, bits=4, group_size=-1)
        for bits in (1, 9):
            with pytest.raises(ConfigurationError, match=f"bits={bits}"):
                quantize_weight(weight, bits=bits)
        with pytest.raises(ConfigurationError, match=r"matrix .*\(4, 10, 1\)"):
            quantize_weight(weight[..., None], bits=4)


class TestRequireFinite:
    def test_names_and_counts(self) -> None:
        bad = torch.tensor([1.0, math.nan, math.inf, -math.inf])
        with pytest.raises(
            NonFiniteError, match=r"the weight of blocks\.3\.to_q holds 1 NaN and 2 infinite values of 4"
        ):
            require_finite(bad, "the weight of blocks.3.to_q")

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_finds_one_among_many(self, value: float, dtype: torch.dtype) -> None:
        tensor = torch.zeros(3, 100, dtype=dtype)
        require_finite(tensor, "x")
        tensor[1, 37] = value
        with pytest.raises(NonFiniteError):
            require_finite(tensor, "x")

    def test_skips_what_has_no_values(self) -> None:
        require_finite(torch.empty(3, device="meta"), "x")
        with FakeTensorMode() as mode:
            require_finite(torch.empty(3), "x")
            fake = mode.from_tensor(torch.full((3,), math.nan))
        require_finite(fake, "x")
        require_finite(torch.empty(0), "x")
        require_finite(torch.ones(3, dtype=torch.uint8), "x")


class TestSqnr:
    def test_known_values(self) -> None:
        reference = torch.full((10,), 10.0)
        assert sqnr_db(reference, reference + 1.0) == pytest.approx(20.0)
        assert sqnr_db(reference, reference) == math.inf
        assert sqnr_db(torch.zeros(3), torch.ones(3)) == -math.inf
        assert math.isnan(sqnr_db(reference, reference * math.nan))

    def test_accumulates_in_float64(self) -> None:
        reference = torch.full((1 << 20,), 200.0, dtype=torch.float16)
        assert sqnr_db(reference, reference + 2.0) == pytest.approx(40.0)

    def test_shapes_must_agree(self) -> None:
        with pytest.raises(ConfigurationError, match=r"\(3,\).*\(3, 1\)"):
            sqnr_db(torch.ones(3), torch.ones(3, 1))


def test_importance_makes_the_mse_search_serve_the_output():
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(32, 64, generator=generator)
    weight[:, :4] *= 6  # Columns that stretch every grid,
    channels = torch.ones(64)
    channels[:4] = 0.01  # and whose inputs hardly ever differ from zero.
    x = torch.randn(256, 64, generator=generator) * channels
    plain = quantize_weight(weight, bits=4, method="mse")
    weighted = quantize_weight(weight, bits=4, method="mse", importance=x.square().mean(dim=0))
    errors = [sqnr_db(x @ weight.T, x @ q.dequantize(torch.float32).T) for q in (plain, weighted)]
    assert errors[1] > errors[0] + 5
    grouped = quantize_weight(weight, bits=4, group_size=16, method="mse", importance=x.square().mean(dim=0))
    assert sqnr_db(x @ weight.T, x @ grouped.dequantize(torch.float32).T) > errors[0]
