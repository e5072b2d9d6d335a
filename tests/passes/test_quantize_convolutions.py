from __future__ import annotations

import pytest
import torch
from torch import nn

from fxquant.errors import ConfigurationError
from fxquant.plan import Plan
from tests.passes.models import planned
from tests.support import golden, rewritten

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
        "input_1_codes: uint8[B, 2, 4, 4] = fxquant::quantize("
        "input_1, @0.input_scale, @0.input_zero_point, 0, 255, uint8)",
        "conv2d_default: float32[B, 4, 2, 2] = fxquant::conv2d(input_1_codes, @0.input_scale, @0.input_zero_point, "
        "@0.weight_packed, @0.weight_scale, @0.weight_zero_point, @0.bias, 8, [2, 2, 2], [2, 2], [0, 0], [1, 1], 1, "
        "float32)",
        "return conv2d_default",
    ]


def test_float_activations() -> None:
    _, after = rewritten(model(), "quantize-convolutions", plan(4, None), input=X)
    assert after.splitlines()[1:] == [
        "dequantize_weight_default: float32[4, 8] = fxquant::dequantize_weight("
        "@0.weight_packed, @0.weight_scale, @0.weight_zero_point, 4, 0, 8, float32)",
        "view_default: float32[4, 2, 2, 2] = view(dequantize_weight_default, [4, 2, 2, 2])",
        "conv2d: float32[B, 4, 2, 2] = conv2d(input_1, view_default, @0.bias, [2, 2])",
        "return conv2d",
    ]


def test_a_float_convolution_stays() -> None:
    before, after = rewritten(model(), "quantize-convolutions", plan(None, None), input=X)
    assert after == before


def test_only_two_dimensional_ones_have_quantized_activations() -> None:
    layer = planned(**{"0": ("conv", [4, 4], 8, 8, 0)})
    with pytest.raises(ConfigurationError, match="layer 0: quantized activations are only there for conv2d"):
        rewritten(nn.Sequential(nn.Conv1d(2, 4, 2)), "quantize-convolutions", layer, input=torch.randn(2, 2, 4))
