from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.errors import ConfigurationError
from fxquant.ir.stages import Stage
from fxquant.pipeline.pipeline import Pipeline
from fxquant.planning.plan import Plan
from tests.passes.models import planned
from tests.support import captured, count, golden, outputs, relative_error, rewritten, text

X = torch.randn(2, 2, 4, 4)


def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 2, stride=2))


def plan(weight: int | None, activation: int | None) -> Plan:
    return planned(**{"0": ("conv", [4, 8], weight, activation, 0)})


def test_before_and_after() -> None:
    before, after = rewritten(model(), "quantize-convolutions", plan(8, 8), input=X)
    assert before == golden(
        """
        input_1: float32[B, 2, 4, 4]
        conv2d: float32[B, 4, 2, 2] = conv2d(input_1, @0.weight, @0.bias, [2, 2])
        return conv2d
        """
    )
    assert after.splitlines()[1:] == [
        "input_1_codes: uint8[B, 2, 4, 4] = fxquant::quantize(input_1, @0.input_scale, @0.input_zero_point, int8)",
        "conv2d_default: float32[B, 4, 2, 2] = fxquant::conv2d(input_1_codes, @0.input_scale, @0.input_zero_point, "
        "@0.weight_packed, @0.weight_scale, @0.weight_zero_point, @0.bias, int8, int8, [2, 2, 2], [2, 2], "
        "[0, 0], [1, 1], 1, float32)",
        "return conv2d_default",
    ]


def test_float_activations() -> None:
    _, after = rewritten(model(), "quantize-convolutions", plan(4, None), input=X)
    assert after.splitlines()[1:] == [
        "dequantize_weight_default: float32[4, 8] = fxquant::dequantize_weight("
        "@0.weight_packed, @0.weight_scale, @0.weight_zero_point, int4, 0, 8, float32)",
        "view_default: float32[4, 2, 2, 2] = view(dequantize_weight_default, [4, 2, 2, 2])",
        "conv2d: float32[B, 4, 2, 2] = conv2d(input_1, view_default, @0.bias, [2, 2])",
        "return conv2d",
    ]


def test_a_float_convolution_stays() -> None:
    before, after = rewritten(model(), "quantize-convolutions", plan(None, None), input=X)
    assert after == before


SPATIAL = {1: (9,), 2: (9, 7)}

OPTIONS: list[tuple[int, dict[str, Any]]] = [
    (1, {"kernel_size": 3}),
    (1, {"kernel_size": 3, "stride": 2, "padding": 2}),
    (1, {"kernel_size": 3, "padding": "same"}),
    (1, {"kernel_size": 4, "padding": "same", "dilation": 3}),
    (1, {"kernel_size": 2, "padding": "valid", "bias": False}),
    (1, {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "groups": 2}),
    (2, {"kernel_size": (3, 2), "padding": "same"}),
    (2, {"kernel_size": (2, 4), "padding": "same", "dilation": (1, 3)}),
    (2, {"kernel_size": 3, "padding": "valid", "stride": (2, 1)}),
]


@pytest.mark.parametrize("activation", [8, None])
@pytest.mark.parametrize(("rank", "options"), OPTIONS)
def test_convolutions_of_any_padding(rank: int, options: dict[str, Any], activation: int | None) -> None:
    torch.manual_seed(0)
    convolution = (nn.Conv1d if rank == 1 else nn.Conv2d)(2, 4, **options)
    x = torch.randn(2, 2, *SPATIAL[rank]) / 4
    found = captured(nn.Sequential(convolution), input=x).module
    (expected,) = outputs(found, x)
    shape = [4, convolution.weight[0].numel()]
    Pipeline.parse("quantize-convolutions").run(found, planned(**{"0": ("conv", shape, 8, activation, 0)}))
    assert count(found, torch.ops.fxquant.conv2d.default) == (activation is not None)
    (actual,) = outputs(found, x)
    assert actual.shape == expected.shape
    assert relative_error([actual], [expected]) < 0.03
    again, plan = text(found), planned(**{"0": ("conv", shape, 8, activation, 0)})
    Pipeline.parse("quantize-convolutions").run(found, plan, Stage.QUANTIZED)
    assert text(found) == again


def test_those_of_three_dimensions_have_float_activations() -> None:
    layer = planned(**{"0": ("conv", [4, 16], 8, 8, 0)})
    with pytest.raises(ConfigurationError, match="layer 0: quantized activations are only supported for conv1d"):
        rewritten(nn.Sequential(nn.Conv3d(2, 4, 2)), "quantize-convolutions", layer, input=torch.randn(2, 2, 4, 4, 4))


class Patched(nn.Module):
    def __init__(self, convolution: nn.Module, axes: int) -> None:
        super().__init__()
        self.patch, self.axes = convolution, axes

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.patch(sample) * timestep.reshape(-1, *[1] * self.axes)


REFUSED = {
    "conv3d": (Patched(nn.Conv3d(2, 4, 2), 4), (2, 2, 4, 4, 4), "not for conv3d"),
    "conv2d without a batch": (Patched(nn.Conv2d(2, 4, 2), 3), (2, 4, 4), "its input has no batch"),
    "conv1d without a batch": (Patched(nn.Conv1d(2, 4, 2, padding="same"), 2), (2, 4), "its input has no batch"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_quantized_activations_is_refused_before_calibration(name: str) -> None:
    model, shape, reason = REFUSED[name]
    calls = []

    def calibrate() -> None:
        model.eval()(torch.randn(shape), torch.tensor([1, 2]))
        calls.append(1)

    with pytest.raises(ConfigurationError, match=f"layer patch: .*{reason}.*overrides=patch=w8a16"):
        fxquant.compile(model.eval(), recipe="rtn-w8a8", layers="all", calibrate=calibrate)
    assert not calls
    recipe = fxquant.make_recipe("rtn-w8a8", "all").with_options("assign-precision", overrides="patch=w8a16")
    assert fxquant.compile(model, recipe=recipe, calibrate=calibrate, measure=0).plan.layers["patch"].weight_bits == 8
