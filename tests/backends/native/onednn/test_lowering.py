"""Graphs before and after lowering, and back to what a checkpoint holds."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from fxquant.backends.native import Native
from fxquant.ir.stages import verify
from fxquant.ir.tensors import read_tensors
from fxquant.pipeline.pipeline import Pipeline
from fxquant.planning.decisions import ActivationRange, LayerPlan
from fxquant.planning.plan import Plan
from tests.support import captured, count, golden, outputs, text

native = torch.ops.fxquant_native


class FeedForward(nn.Module):
    """Two linears with a GELU between."""

    def __init__(self, approximate: str = "tanh", shared: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8, bias=False)
        self.approximate, self.shared = approximate, shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x)
        z = self.down(functional.gelu(y, approximate=self.approximate))
        return z + y[..., :8] if self.shared else z


def plan_for(bits: int, activation: str = "minmax") -> Plan:
    ranges = {"up": ActivationRange(-3.0, 3.0, activation), "down": ActivationRange(-0.2, 2.0, activation)}
    plan = Plan("", "", None)
    for name, shape in (("up", [24, 8]), ("down", [8, 24])):
        plan.layers[name] = LayerPlan("linear", "block", shape, bits, 8, activation=ranges[name])
    return plan


def quantized(model: nn.Module, plan: Plan, symmetric: bool = False) -> torch.fx.GraphModule:
    module = captured(model, torch.randn(2, 3, 8)).module
    Pipeline.parse(f"quantize-linears{{symmetric={symmetric}}}").run(module, plan)
    return module


def lowered(model: nn.Module, bits: int, symmetric: bool = False, activation: str = "minmax") -> torch.fx.GraphModule:
    """Checked against the quantized graph, and that the way back finds its tensors."""
    plan = plan_for(bits, activation)
    module = quantized(model, plan, symmetric)
    x = torch.randn(2, 3, 8)
    expected, before = outputs(module, x), {name: tensor.clone() for name, tensor in read_tensors(module).items()}
    Native("onednn").finish(module, plan)
    verify(module, Native.spec)
    torch.testing.assert_close(outputs(module, x), expected, rtol=1e-4, atol=1e-4)
    back = Native("onednn").stored(module)
    assert back.keys() == before.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in before.items())
    return module


def test_symmetric_weights_end_in_one_kernel_each() -> None:
    assert text(lowered(FeedForward(), 8, symmetric=True)) == golden("""
        x: float32[B, 3, 8]
        x_codes_1: uint8[B, 3, 8] = fxquant_native::quantize(x, @up.input_scale, @up.input_zero_point, 255)
        linear_gelu_default: uint8[B, 3, 24] = fxquant_native::linear_gelu(x_codes_1, @up.input_scale, @up.input_zero_point, @up.weight_packed_int8, @up.weight_scale, @up.weight_zero_point, @up.bias, 8, @down.input_scale, @down.input_zero_point, 255)
        linear_default_3: float32[B, 3, 8] = fxquant_native::linear(linear_gelu_default, @down.input_scale, @down.input_zero_point, @down.weight_packed_int8, @down.weight_scale, @down.weight_zero_point, None, None, 8, float32)
        return linear_default_3
        """)  # noqa: E501


def test_asymmetric_weights_of_eight_bits_add_what_int8_lacks() -> None:
    assert text(lowered(FeedForward(), 8)) == golden("""
        x: float32[B, 3, 8]
        x_codes_1: uint8[B, 3, 8] = fxquant_native::quantize(x, @up.input_scale, @up.input_zero_point, 255)
        linear_default_2: float32[B, 3, 24] = fxquant_native::linear(x_codes_1, @up.input_scale, @up.input_zero_point, @up.weight_packed_int8, @up.weight_scale, @up.weight_zero_point, None, @up.bias, 8, float32)
        input_sums_default: float32[B, 3, 1] = fxquant_native::input_sums(x_codes_1, @up.input_scale, @up.input_zero_point)
        add_missing_default: float32[B, 3, 24] = fxquant_native::add_missing(linear_default_2, input_sums_default, @up.weight_packed_missing_offset, float32)
        gelu: float32[B, 3, 24] = gelu(add_missing_default, approximate=tanh)
        gelu_codes_1: uint8[B, 3, 24] = fxquant_native::quantize(gelu, @down.input_scale, @down.input_zero_point, 255)
        linear_default_3: float32[B, 3, 8] = fxquant_native::linear(gelu_codes_1, @down.input_scale, @down.input_zero_point, @down.weight_packed_int8, @down.weight_scale, @down.weight_zero_point, None, None, 8, float32)
        input_sums_default_1: float32[B, 3, 1] = fxquant_native::input_sums(gelu_codes_1, @down.input_scale, @down.input_zero_point)
        add_missing_default_1: float32[B, 3, 8] = fxquant_native::add_missing(linear_default_3, input_sums_default_1, @down.weight_packed_missing_offset, float32)
        return add_missing_default_1
        """)  # noqa: E501


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_weights_of_fewer_bits_lack_nothing(bits: int) -> None:
    module = lowered(FeedForward(), bits)
    assert count(module, native.linear_gelu.default) == 1
    assert count(module, native.add_missing.default) == 0


@pytest.mark.parametrize(
    ("model", "symmetric", "activation"),
    [
        (FeedForward(approximate="none"), True, "minmax"),  # The exact GELU is another function.
        (FeedForward(shared=True), True, "minmax"),  # The linear has another reader.
        (FeedForward(), True, "dynamic"),  # Grids of tokens are known after the GELU only.
    ],
    ids=["exact", "shared", "dynamic"],
)
def test_gelu_stays(model: nn.Module, symmetric: bool, activation: str) -> None:
    module = lowered(model, 8, symmetric, activation)
    assert count(module, native.linear_gelu.default) == 0
    assert count(module, torch.ops.aten.gelu.default) == 1
    assert count(module, native.linear.default) == 2


def test_linears_of_one_input_share_its_codes_and_sums() -> None:
    class Projections(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.up, self.down = nn.Linear(8, 24), nn.Linear(8, 8, bias=False)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.up(x), self.down(x)

    plan = plan_for(8)
    plan.layers["down"].activation = plan.layers["up"].activation
    plan.layers["down"].shape = [8, 8]
    module = quantized(Projections(), plan)
    Native("onednn").finish(module, plan)
    ops = (native.quantize.default, native.input_sums.default, native.linear.default)
    assert [count(module, op) for op in ops] == [1, 1, 2]
