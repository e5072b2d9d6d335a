from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.errors import CalibrationError, ConfigurationError, NonFiniteError
from fxquant.pipeline.pipeline import Pipeline
from fxquant.pipeline.recipes import Recipe
from fxquant.statistics.collection import Statistics
from fxquant.statistics.moments import SecondMoments
from tests import tiny
from tests.passes.models import Patches, patches, planned
from tests.support import captured, count, golden, rewritten

CONV = ("conv", [4, 8], None, None, 0)


def test_before_and_after() -> None:
    plan = planned(conv=CONV, q=("linear", [4, 4], 4, 8, 2), k=("linear", [2, 4], 8, 8, 0))
    before, after = rewritten(Patches(), "quantize-linears", plan, **patches())
    assert before == golden(
        """
        x: float32[B, 2, 4, 4]
        timestep: float32[B]
        conv2d: float32[B, 4, 2, 2] = conv2d(x, @conv.weight, @conv.bias, [2, 2])
        flatten: float32[B, 4, 4] = flatten.using_ints(conv2d, 2)
        transpose: float32[B, 4, 4] = transpose.int(flatten, 1, 2)
        linear: float32[B, 4, 4] = linear(transpose, @q.weight, @q.bias)
        linear_1: float32[B, 4, 2] = linear(transpose, @k.weight)
        return linear, linear_1
        """
    )
    assert lines(after)[:5] == lines(before)[:5]
    assert lines(after)[5:] == [
        "transpose_codes: uint8[B, 4, 4] = fxquant::quantize(transpose, @q.input_scale, @q.input_zero_point, int8)",
        "linear_default: float32[B, 4, 4] = fxquant::linear(transpose_codes, @q.input_scale, @q.input_zero_point, "
        "@q.weight_packed, @q.weight_scale, @q.weight_zero_point, @q.bias, int8, int4, 2, float32)",
        "linear_default_1: float32[B, 4, 2] = fxquant::linear(transpose_codes, @q.input_scale, @q.input_zero_point, "
        "@k.weight_packed, @k.weight_scale, @k.weight_zero_point, None, int8, int8, 0, float32)",
        "return linear_default, linear_default_1",
    ]


def test_float_activations() -> None:
    plan = planned(conv=CONV, q=("linear", [4, 4], 4, None, 2), k=("linear", [2, 4], None, None, 0))
    before, after = rewritten(Patches(), "quantize-linears", plan, **patches())
    assert lines(after) == [
        *lines(before)[:5],
        "dequantize_weight_default: float32[4, 4] = fxquant::dequantize_weight("
        "@q.weight_packed, @q.weight_scale, @q.weight_zero_point, int4, 2, 4, float32)",
        "linear: float32[B, 4, 4] = linear(transpose, dequantize_weight_default, @q.bias)",
        *lines(before)[6:],
    ]


def test_float_layers_stay() -> None:
    plan = planned(conv=CONV, q=("linear", [4, 4], None, None, 0), k=("linear", [2, 4], None, None, 0))
    before, after = rewritten(Patches(), "quantize-linears", plan, **patches())
    assert after == before


class Shared(nn.Module):
    """One weight, read by two linears and by a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(self.q(x)) + self.q.weight.sum()


def test_layers_that_share_a_weight_share_its_codes_and_others_keep_it() -> None:
    plan = planned(**{"q": ("linear", [4, 4], 8, 8, 0), "q@2": ("linear", [4, 4], 8, 8, 0)})
    model = Shared()
    module = captured(model, x=torch.randn(2, 4)).module
    Pipeline.parse("quantize-linears").run(module, plan)
    assert count(module, torch.ops.fxquant.linear.default) == 2
    names = {name for name, _ in [*module.named_parameters(), *module.named_buffers()] if "weight" in name}
    assert names == {"q.weight", "q.weight_packed", "q.weight_scale", "q.weight_zero_point"}
    assert torch.equal(module.get_parameter("q.weight"), model.q.weight)
    assert plan.layers["q@2"].weight_sqnr_db == plan.layers["q"].weight_sqnr_db


def test_a_weight_that_is_not_finite_is_named() -> None:
    model = Patches()
    model.q.weight.data[0, 0] = torch.nan
    plan = planned(conv=CONV, q=("linear", [4, 4], 8, 8, 0), k=("linear", [2, 4], 8, 8, 0))
    with pytest.raises(NonFiniteError, match="weight of layer q"):
        rewritten(model, "quantize-linears", plan, **patches())


def test_groups_have_to_divide_the_input() -> None:
    plan = planned(conv=CONV, q=("linear", [4, 4], 8, 8, 3), k=("linear", [2, 4], 8, 8, 0))
    with pytest.raises(ConfigurationError, match="3"):
        rewritten(Patches(), "quantize-linears", plan, **patches())


def test_without_statistics_there_is_no_range() -> None:
    plan = planned(conv=CONV, q=("linear", [4, 4], 8, 8, 0), k=("linear", [2, 4], 8, 8, 0))
    plan.layers["q"].activation = None
    with pytest.raises(CalibrationError, match="layer 'q' needs an activation range"):
        rewritten(Patches(), "quantize-linears", plan, **patches())


def lines(text: str) -> list[str]:
    return text.splitlines()


def gptq_recipe(prefix: str = "w4a8") -> Recipe:
    return Recipe.parse(f"assign-precision{{precision={prefix} layers=all}} ; quantize-linears{{rounding=gptq}}")


@pytest.mark.parametrize("rounding", ["gptq", "adaround"])
def test_moments_that_are_not_finite_name_their_layer(rounding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Reads().eval()
    monkeypatch.setattr(SecondMoments, "of", lambda self, *_: torch.full((self.channels, self.channels), torch.nan))
    recipe = str(gptq_recipe()).replace("gptq", rounding)
    with pytest.raises(NonFiniteError, match=r"layer linear: .*hold NaN or infinity"):
        fxquant.compile(
            model,
            recipe=Recipe.parse(recipe),
            calibrate=lambda: model(torch.randn(2, 5, 8), torch.tensor([1.0, 2.0])),
            measure=0,
        )


class Reads(nn.Module):
    """A linear that reads the input as it comes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.linear(x) + timestep[:, None, None]


@pytest.mark.parametrize("rounding", ["gptq", "adaround"])
def test_one_huge_row_of_a_finite_model_is_no_reason_to_refuse(rounding: str) -> None:
    model = Reads().eval()
    call = torch.randn(2, 5, 8), torch.tensor([500.0, 500.0])
    call[0][0, 3] *= 1e30  # Its square is no number of float32.
    quantized = fxquant.compile(
        model, recipe=f"rtn-{rounding}-w4a8", calibrate=lambda: model(*call), measure=0, layers="all"
    )
    assert torch.isfinite(quantized(*call)).all()


@pytest.mark.parametrize("precision", ["w4a8", "w4a16-g8"])
def test_gptq_lowers_the_error_of_the_output_and_replays(precision: str, tmp_path) -> None:
    model, errors = tiny.make_dit(), {}
    calls = [tiny.inputs(8, step, seed=seed) for seed, step in enumerate(tiny.STEPS)]
    reference = [model(**call).sample for call in calls]
    for recipe in (gptq_recipe(precision), Recipe.parse(str(gptq_recipe(precision)).replace("{rounding=gptq}", ""))):
        statistics = Statistics()
        quantized = fxquant.compile(
            model, recipe=recipe, calibrate=lambda: [model(**call) for call in calls], statistics=statistics, measure=0
        )
        errors[str(recipe)] = sum(
            float((quantized(**call).sample - right).square().sum())
            for call, right in zip(calls, reference, strict=True)
        )
        if "gptq" in str(recipe):
            first, kept = quantized, statistics
    gptq, nearest = errors.values()
    assert gptq < 0.7 * nearest
    # Replayed without weights, and on the float model with the statistics; without them there is nothing to round by.
    fxquant.save(first, tmp_path / "q")
    assert torch.equal(fxquant.load(tmp_path / "q")(**calls[0]).sample, first(**calls[0]).sample)
    again = fxquant.compile(model, plan=first.plan, statistics=kept)
    assert torch.equal(again(**calls[0]).sample, first(**calls[0]).sample)
    with pytest.raises(CalibrationError, match=r"rounded by GPTQ.*statistics="):
        fxquant.compile(model, plan=first.plan)
