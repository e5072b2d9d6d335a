"""Graphs before and after lowering, and back to what a checkpoint holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from fxquant.backends.torchao import TorchAO
from fxquant.errors import SpeedWarning
from fxquant.ir.stages import verify
from fxquant.ir.tensors import read_tensors
from fxquant.pipeline.pipeline import Pipeline
from fxquant.planning.decisions import ActivationRange, LayerPlan
from fxquant.planning.plan import Plan
from tests.support import captured, count, golden, outputs, text

ours = torch.ops.fxquant_torchao


class FeedForward(nn.Module):
    """Two linears with a GELU between."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(functional.gelu(self.up(x), approximate="tanh"))


class Patches(nn.Module):
    """A convolution."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Conv2d(4, 6 if groups == 1 else 8, 2, stride=2, padding=1, groups=groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


def plan_for(model: nn.Module, bits: int, activation_bits: int | None = 8, method: str = "minmax") -> Plan:
    ranges = {"up": (-3.0, 3.0), "down": (-0.2, 2.0), "proj": (-3.0, 2.0)}
    plan = Plan("", "", None)
    for name, module in model.named_children():
        weight = module.weight.flatten(1)
        kind = "linear" if isinstance(module, nn.Linear) else "conv"
        span = None if activation_bits is None else ActivationRange(*ranges[name], method)
        plan.layers[name] = LayerPlan(kind, "block", [*weight.shape], bits, activation_bits, activation=span)
    return plan


def lowered(
    model: nn.Module,
    plan: Plan,
    symmetric: bool = False,
    shape: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
    error: float = 1e-4,
) -> torch.fx.GraphModule:
    """Checked against the quantized graph, and that the way back finds its tensors."""
    linear = isinstance(model, FeedForward)
    shape = shape or ((2, 3, model.up.in_features) if isinstance(model, FeedForward) else (2, 4, 6, 6))
    torch.manual_seed(1)
    x = torch.randn(shape).to(dtype)
    module = captured(model.to(dtype), x).module
    step = "quantize-linears" if linear else "quantize-convolutions"
    Pipeline.parse(f"{step}{{symmetric={symmetric}}}" if linear else step).run(module, plan)
    expected, before = outputs(module, x), {name: tensor.clone() for name, tensor in read_tensors(module).items()}
    TorchAO().finish(module, plan)
    verify(module, TorchAO.spec)
    torch.testing.assert_close(outputs(module, x), expected, rtol=error, atol=error)
    back = TorchAO().stored(module)
    assert back.keys() == before.keys()
    for name, tensor in before.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor), name
    return module


def test_symmetric_weights_become_the_graph_that_is_fused() -> None:
    module = lowered(FeedForward(), plan_for(FeedForward(), 8), symmetric=True)
    assert text(module) == golden("""
        x: float32[B, 3, 8]
        x_codes_1: uint8[B, 3, 8] = quantized_decomposed::quantize_per_tensor(x, 0.0235294122248888, 127, 0, 255, uint8)
        dequantize_per_tensor_default: float32[B, 3, 8] = quantized_decomposed::dequantize_per_tensor(x_codes_1, 0.0235294122248888, 127, 0, 255, uint8)
        view_default: float32[24] = view(@up.weight_scale, [-1])
        dequantize_per_channel_default: float32[24, 8] = quantized_decomposed::dequantize_per_channel(@up.weight_packed_int8, view_default, @zero_points_of_24, 0, -128, 127, int8)
        linear_default_2: float32[B, 3, 24] = linear(dequantize_per_tensor_default, dequantize_per_channel_default, @up.bias)
        gelu: float32[B, 3, 24] = gelu(linear_default_2, approximate=tanh)
        gelu_codes_1: uint8[B, 3, 24] = quantized_decomposed::quantize_per_tensor(gelu, 0.00862745102494955, 23, 0, 255, uint8)
        dequantize_per_tensor_default_1: float32[B, 3, 24] = quantized_decomposed::dequantize_per_tensor(gelu_codes_1, 0.00862745102494955, 23, 0, 255, uint8)
        view_default_1: float32[8] = view(@down.weight_scale, [-1])
        dequantize_per_channel_default_1: float32[8, 24] = quantized_decomposed::dequantize_per_channel(@down.weight_packed_int8, view_default_1, @zero_points_of_8, 0, -128, 127, int8)
        linear_default_3: float32[B, 3, 8] = linear(dequantize_per_tensor_default_1, dequantize_per_channel_default_1, None)
        return linear_default_3
        """)  # noqa: E501


def test_asymmetric_weights_of_eight_bits_take_off_what_int8_has_in_excess() -> None:
    module = lowered(FeedForward(), plan_for(FeedForward(), 8))
    assert text(module) == golden("""
        x: float32[B, 3, 8]
        x_codes_1: uint8[B, 3, 8] = quantized_decomposed::quantize_per_tensor(x, 0.0235294122248888, 127, 0, 255, uint8)
        dequantize_per_tensor_default: float32[B, 3, 8] = quantized_decomposed::dequantize_per_tensor(x_codes_1, 0.0235294122248888, 127, 0, 255, uint8)
        view_default: float32[24] = view(@up.weight_scale, [-1])
        dequantize_per_channel_default: float32[24, 8] = quantized_decomposed::dequantize_per_channel(@up.weight_packed_int8, view_default, @zero_points_of_24, 0, -128, 127, int8)
        linear_default_2: float32[B, 3, 24] = linear(dequantize_per_tensor_default, dequantize_per_channel_default, @up.bias)
        input_sums_default: float32[B, 3, 1] = fxquant_torchao::input_sums(x_codes_1, 0.0235294122248888, 127)
        mul_tensor: float32[B, 3, 24] = mul.Tensor(input_sums_default, @up.weight_packed_excess)
        sub_tensor: float32[B, 3, 24] = sub.Tensor(linear_default_2, mul_tensor)
        gelu: float32[B, 3, 24] = gelu(sub_tensor, approximate=tanh)
        gelu_codes_1: uint8[B, 3, 24] = quantized_decomposed::quantize_per_tensor(gelu, 0.00862745102494955, 23, 0, 255, uint8)
        dequantize_per_tensor_default_1: float32[B, 3, 24] = quantized_decomposed::dequantize_per_tensor(gelu_codes_1, 0.00862745102494955, 23, 0, 255, uint8)
        view_default_1: float32[8] = view(@down.weight_scale, [-1])
        dequantize_per_channel_default_1: float32[8, 24] = quantized_decomposed::dequantize_per_channel(@down.weight_packed_int8, view_default_1, @zero_points_of_8, 0, -128, 127, int8)
        linear_default_3: float32[B, 3, 8] = linear(dequantize_per_tensor_default_1, dequantize_per_channel_default_1, None)
        input_sums_default_1: float32[B, 3, 1] = fxquant_torchao::input_sums(gelu_codes_1, 0.00862745102494955, 23)
        mul_tensor_1: float32[B, 3, 8] = mul.Tensor(input_sums_default_1, @down.weight_packed_excess)
        sub_tensor_1: float32[B, 3, 8] = sub.Tensor(linear_default_3, mul_tensor_1)
        return sub_tensor_1
        """)  # noqa: E501


def test_grids_of_tokens() -> None:
    model = FeedForward()
    assert text(lowered(model, plan_for(model, 8, method="dynamic"))) == golden("""
        x: float32[B, 3, 8]
        x_grid: float32[2, B, 3, 1] = fxquant::token_grid(x, int8)
        x_scale: float32[B, 3, 1] = select.int(x_grid, 0, 0)
        x_zero_point: float32[B, 3, 1] = select.int(x_grid, 0, 1)
        x_codes_1: uint8[B, 3, 8] = fxquant_torchao::quantize_rows(x, x_scale, x_zero_point, 255)
        linear_rows_default: float32[B, 3, 24] = fxquant_torchao::linear_rows(x_codes_1, x_scale, x_zero_point, @up.weight_packed_int8, @up.weight_scale, @up.weight_packed_sums, @up.weight_packed_excess, @up.bias, float32)
        gelu: float32[B, 3, 24] = gelu(linear_rows_default, approximate=tanh)
        gelu_grid: float32[2, B, 3, 1] = fxquant::token_grid(gelu, int8)
        gelu_scale: float32[B, 3, 1] = select.int(gelu_grid, 0, 0)
        gelu_zero_point: float32[B, 3, 1] = select.int(gelu_grid, 0, 1)
        gelu_codes_1: uint8[B, 3, 24] = fxquant_torchao::quantize_rows(gelu, gelu_scale, gelu_zero_point, 255)
        linear_rows_default_1: float32[B, 3, 8] = fxquant_torchao::linear_rows(gelu_codes_1, gelu_scale, gelu_zero_point, @down.weight_packed_int8, @down.weight_scale, @down.weight_packed_sums, @down.weight_packed_excess, None, float32)
        return linear_rows_default_1
        """)  # noqa: E501


def test_weights_behind_float_activations() -> None:
    model = FeedForward()
    assert text(lowered(model, plan_for(model, 8, None))) == golden("""
        x: float32[B, 3, 8]
        linear_of_bytes_default: float32[B, 3, 24] = fxquant_torchao::linear_of_bytes(x, @up.weight_packed_int8, @up.weight_scale, @up.weight_packed_excess, @up.bias)
        gelu: float32[B, 3, 24] = gelu(linear_of_bytes_default, approximate=tanh)
        linear_of_bytes_default_1: float32[B, 3, 8] = fxquant_torchao::linear_of_bytes(gelu, @down.weight_packed_int8, @down.weight_scale, @down.weight_packed_excess, None)
        return linear_of_bytes_default_1
        """)  # noqa: E501


def test_weights_of_four_bits_behind_float_activations() -> None:
    model = FeedForward(32)
    plan = plan_for(model, 4, None)
    for layer in plan.layers.values():
        layer.group_size = 32
    module = lowered(model, plan, dtype=torch.bfloat16, error=0.02)
    assert text(module) == golden("""
        x: bfloat16[B, 3, 32]
        linear_of_nibbles_default: bfloat16[B, 3, 96] = fxquant_torchao::linear_of_nibbles(x, @up.weight_packed_int4, @up.weight_scale, @up.weight_zero_point, 4, 32, @up.bias)
        gelu: bfloat16[B, 3, 96] = gelu(linear_of_nibbles_default, approximate=tanh)
        linear_of_nibbles_default_1: bfloat16[B, 3, 32] = fxquant_torchao::linear_of_nibbles(gelu, @down.weight_packed_int4, @down.weight_scale, @down.weight_zero_point, 4, 32, None)
        return linear_of_nibbles_default_1
        """)  # noqa: E501


def test_a_convolution() -> None:
    model = Patches()
    assert text(lowered(model, plan_for(model, 8))) == golden("""
        x: float32[B, 4, 6, 6]
        x_codes_1: uint8[B, 4, 6, 6] = quantized_decomposed::quantize_per_tensor(x, 0.019607843831181526, 153, 0, 255, uint8)
        dequantize_per_tensor_default: float32[B, 4, 6, 6] = quantized_decomposed::dequantize_per_tensor(x_codes_1, 0.019607843831181526, 153, 0, 255, uint8)
        view_default: float32[6] = view(@proj.weight_scale, [-1])
        dequantize_per_channel_default: float32[6, 4, 2, 2] = quantized_decomposed::dequantize_per_channel(@proj.weight_packed_int8, view_default, @zero_points_of_6, 0, -128, 127, int8)
        conv2d_default_1: float32[B, 6, 4, 4] = conv2d(dequantize_per_tensor_default, dequantize_per_channel_default, @proj.bias, [2, 2], [1, 1], [1, 1], 1)
        view_default_1: float32[6, 1, 1] = view(@proj.weight_packed_excess, [-1, 1, 1])
        window_sums_default: float32[B, 1, 4, 4] = fxquant_torchao::window_sums(x_codes_1, 0.019607843831181526, 153, [4, 2, 2], [2, 2], [1, 1], [1, 1], 1, 6)
        mul_tensor: float32[B, 6, 4, 4] = mul.Tensor(window_sums_default, view_default_1)
        sub_tensor: float32[B, 6, 4, 4] = sub.Tensor(conv2d_default_1, mul_tensor)
        return sub_tensor
        """)  # noqa: E501


@pytest.mark.parametrize("groups", [2, 4])
def test_a_convolution_in_groups(groups: int) -> None:
    model = Patches(groups)
    module = lowered(model, plan_for(model, 8))
    assert count(module, torch.ops.fxquant.conv2d.default) == 0


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_weights_of_fewer_bits_have_nothing_in_excess(bits: int) -> None:
    module = lowered(FeedForward(), plan_for(FeedForward(), bits))
    assert count(module, ours.input_sums.default) == 0


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_activations_of_fewer_bits_end_at_their_highest_code(bits: int) -> None:
    """The fusions would clamp them at 255."""
    module = lowered(FeedForward(), plan_for(FeedForward(), 8, bits))
    clamps = [node for node in module.graph.nodes if node.target is torch.ops.aten.clamp_max.default]
    assert [node.args[1] for node in clamps] == [2**bits - 1] * 2


@pytest.mark.parametrize("bits", [2, 4, 5, 8])
def test_weights_alone_in_every_width(bits: int) -> None:
    module = lowered(FeedForward(), plan_for(FeedForward(), bits, None))
    assert count(module, ours.linear_of_bytes.default) == 2


def test_groups_in_float32_stay_with_the_reference_and_that_is_told() -> None:
    model = FeedForward(32)
    plan = plan_for(model, 4, None)
    for layer in plan.layers.values():
        layer.group_size = 32
    with pytest.warns(SpeedWarning, match=r"2 layers .*float32 on cpu.*bfloat16"):
        module = lowered(model, plan)
    assert count(module, torch.ops.fxquant.dequantize_weight.default) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    lowered(FeedForward(), plan_for(FeedForward(), 8), dtype=dtype, error=2e-3 if dtype == torch.float16 else 1e-5)


def test_linears_of_one_input_share_its_codes_and_sums() -> None:
    class Projections(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.up, self.down = nn.Linear(8, 24), nn.Linear(8, 24, bias=False)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.up(x), self.down(x)

    plan = plan_for(Projections(), 8)
    plan.layers["down"].activation = plan.layers["up"].activation
    module = captured(Projections(), torch.randn(2, 3, 8)).module
    Pipeline.parse("quantize-linears").run(module, plan)
    TorchAO().finish(module, plan)
    pt2e: Any = torch.ops.quantized_decomposed
    ops = (pt2e.quantize_per_tensor.default, ours.input_sums.default, torch.ops.aten.linear.default)
    assert [count(module, op) for op in ops] == [1, 1, 2]
    zeros = {name for name in read_tensors(module) if name.startswith("zero_points_of_")}
    assert zeros == {"zero_points_of_24"}
