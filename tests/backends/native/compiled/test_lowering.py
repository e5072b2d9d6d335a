"""Graphs before and after lowering to the compiled kernels, and back to what a checkpoint holds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fxquant.backends.native import Native, machine
from fxquant.ir.attention import find_attentions
from fxquant.ir.stages import verify
from fxquant.ir.tensors import read_tensors
from fxquant.numerics.sqnr import sqnr_db
from fxquant.pipeline.pipeline import Pipeline
from fxquant.planning.decisions import ActivationRange, AttentionPlan, LayerPlan
from fxquant.planning.plan import Plan
from tests.support import captured, count, golden, outputs, text

pytestmark = pytest.mark.skipif(machine.missing_kernels() is not None, reason="there are no compiled kernels here")
native, aten = torch.ops.fxquant_native, torch.ops.aten


class Block(nn.Module):
    """A modulated feed-forward with a gate, as in a diffusion transformer."""

    def __init__(self, approximate: str = "tanh", shared: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8, bias=False)
        self.approximate, self.shared = approximate, shared

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = c.chunk(3, 1)
        y = functional.layer_norm(x, [8], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
        y = self.up(y)
        z = self.down(functional.gelu(y, approximate=self.approximate))
        z = x + gate[:, None] * z
        return z + y[..., :8] if self.shared else z


class Attention(nn.Module):
    def __init__(self, masked: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.masked = masked

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(x.shape[0], -1, 2, 8).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mask = None
        if self.masked:
            mask = (x[:, None, :1, :1] * torch.arange(5.0)).expand(-1, 1, 5, 5)
            mask = mask > -1.0 if self.masked == "bool" else mask
        y = functional.scaled_dot_product_attention(q, k, v, mask)
        return self.out(y.transpose(1, 2).reshape(x.shape))


def plan_for(shapes: dict[str, list[int]], bits: int = 8, method: str = "minmax") -> Plan:
    plan = Plan("", "", None)
    for name, shape in shapes.items():
        plan.layers[name] = LayerPlan("linear", "block", shape, bits, 8, activation=ActivationRange(-2.0, 2.0, method))
    return plan


def lowered(
    model: nn.Module, plan: Plan, *inputs: Tensor, passes: str = "quantize-linears", **options: object
) -> torch.fx.GraphModule:
    """Checked against the quantized graph, and that the way back finds its tensors."""
    module = captured(model, *inputs).module
    Pipeline.parse(passes).run(module, plan)
    expected, before = outputs(module, *inputs), {name: t.clone() for name, t in read_tensors(module).items()}
    backend = Native("compiled", **options)  # type: ignore[arg-type]
    backend.finish(module, plan)
    verify(module, Native.spec)
    (found,), (right,) = outputs(module, *inputs), expected
    assert sqnr_db(right, found) > 38.0  # What attention in bfloat16 may cost.
    back = backend.stored(module)
    assert back.keys() == before.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in before.items())
    return module


def block(
    model: nn.Module | None = None, bits: int = 8, method: str = "minmax", **options: object
) -> torch.fx.GraphModule:
    plan = plan_for({"up": [24, 8], "down": [8, 24]}, bits, method)
    return lowered(model or Block(), plan, torch.randn(2, 5, 8), torch.randn(2, 24), **options)


def test_a_block_is_three_kernels() -> None:
    assert text(block()) == golden("""
        x: float32[B, 5, 8]
        c: float32[B, 24]
        chunk = chunk(c, 3, 1)
        getitem: float32[B, 8] = getitem(chunk, 0)
        getitem_1: float32[B, 8] = getitem(chunk, 1)
        getitem_2: float32[B, 8] = getitem(chunk, 2)
        slice_1: float32[B, 8] = slice.Tensor(getitem_1, 0, 0, 9223372036854775807)
        unsqueeze: float32[B, 1, 8] = unsqueeze(slice_1, 1)
        slice_2: float32[B, 8] = slice.Tensor(getitem, 0, 0, 9223372036854775807)
        unsqueeze_1: float32[B, 1, 8] = unsqueeze(slice_2, 1)
        norm_quantize_default: uint8[B, 5, 8] = fxquant_native::norm_quantize(x, True, 1e-06, None, None, unsqueeze, 1.0, unsqueeze_1, @up.input_scale, @up.input_zero_point, 255)
        vnni_linear_default_3: uint8[B, 5, 24] = fxquant_native::vnni_linear(norm_quantize_default, @up.input_scale, @up.input_zero_point, @up.weight_packed_panels, @up.weight_scale, @up.weight_zero_point, @up.weight_packed_sums, @up.bias, 8, 24, gelu_tanh, None, None, @down.input_scale, @down.input_zero_point, 255, float32)
        slice_3: float32[B, 8] = slice.Tensor(getitem_2, 0, 0, 9223372036854775807)
        unsqueeze_2: float32[B, 1, 8] = unsqueeze(slice_3, 1)
        vnni_linear_default_5: float32[B, 5, 8] = fxquant_native::vnni_linear(vnni_linear_default_3, @down.input_scale, @down.input_zero_point, @down.weight_packed_panels, @down.weight_scale, @down.weight_zero_point, @down.weight_packed_sums, None, 8, 8, none, unsqueeze_2, x, None, None, 255, float32)
        return vnni_linear_default_5
        """)  # noqa: E501


@pytest.mark.parametrize("bits", [2, 4, 7, 8])
@pytest.mark.parametrize("packed", [True, False])
def test_weights_of_few_bits_stay_packed(bits: int, packed: bool) -> None:
    held = read_tensors(block(bits=bits, packed=packed))["up.weight_packed_panels"]
    halves = packed and bits <= 4
    assert held.dtype == (torch.uint8 if halves else torch.int8)
    assert held.numel() == 32 * (4 if halves else 8)


@pytest.mark.parametrize(
    ("model", "method"),
    [
        (Block(approximate="none"), "minmax"),  # The exact GELU is another function.
        (Block(shared=True), "minmax"),  # The linear has another reader.
        (Block(), "dynamic"),  # Grids of tokens are known after the GELU only.
    ],
    ids=["exact", "shared", "dynamic"],
)
def test_what_others_read_or_kernels_lack_stays(model: nn.Module, method: str) -> None:
    module = block(model, method=method)
    assert count(module, native.vnni_linear.default) == 2
    assert count(module, native.quantize.default) == (2 if method == "dynamic" else 1)


ATTENTION = {name: [16, 16] for name in ("q", "k", "v", "out")}


@pytest.mark.parametrize("masked", ["", "bool", "float"])
def test_float_attention_writes_codes(masked: str) -> None:
    if not machine.has_bf16_products():
        pytest.skip("this processor does not multiply bfloat16")
    module = lowered(Attention(masked), plan_for(ATTENTION), torch.randn(2, 5, 16))
    assert count(module, native.bf16_attention.default) == 1
    assert count(module, native.quantize.default) == 1  # Of the input: that of the output is the attention's.
    module = lowered(Attention(masked), plan_for(ATTENTION), torch.randn(2, 5, 16), attention="float")
    assert count(module, native.bf16_attention.default) == 0


def quantized_attention(masked: str = "") -> torch.fx.GraphModule:
    plan = plan_for(ATTENTION)
    (found,) = find_attentions(captured(Attention(masked), torch.randn(2, 5, 16)).module.graph)
    plan.attentions[found.name] = AttentionPlan(
        bits=8, ranges={side: ActivationRange(-1.5, 1.5, "minmax") for side in "qkv"}, softmax_bits=8
    )
    return lowered(Attention(masked), plan, torch.randn(2, 5, 16), passes="quantize-linears,quantize-attention")


def test_quantized_attention_is_integers_from_end_to_end() -> None:
    assert text(quantized_attention()) == golden("""
        x: float32[B, 5, 16]
        sym_size_int_1 = sym_size.int(x, 0)
        x_codes_1: uint8[B, 5, 16] = fxquant_native::quantize(x, @q.input_scale, @q.input_zero_point, 255)
        vnni_linear_default_4: uint8[B, 5, 16] = fxquant_native::vnni_linear(x_codes_1, @q.input_scale, @q.input_zero_point, @q.weight_packed_panels, @q.weight_scale, @q.weight_zero_point, @q.weight_packed_sums, @q.bias, 8, 16, none, None, None, @attention.q_scale_0.353553_divided, @attention.q_zero_point, 255, float32)
        view_default: uint8[B, 5, 2, 8] = view(vnni_linear_default_4, [sym_size_int_1, -1, 2, 8])
        transpose_int_2: uint8[B, 2, 5, 8] = transpose.int(view_default, 1, 2)
        vnni_linear_default_5: uint8[B, 5, 16] = fxquant_native::vnni_linear(x_codes_1, @q.input_scale, @q.input_zero_point, @k.weight_packed_panels, @k.weight_scale, @k.weight_zero_point, @k.weight_packed_sums, @k.bias, 8, 16, none, None, None, @attention.k_scale, @attention.k_zero_point, 255, float32)
        view_default_1: uint8[B, 5, 2, 8] = view(vnni_linear_default_5, [sym_size_int_1, -1, 2, 8])
        transpose_int_3: uint8[B, 2, 5, 8] = transpose.int(view_default_1, 1, 2)
        vnni_linear_default_6: uint8[B, 5, 16] = fxquant_native::vnni_linear(x_codes_1, @q.input_scale, @q.input_zero_point, @v.weight_packed_panels, @v.weight_scale, @v.weight_zero_point, @v.weight_packed_sums, @v.bias, 8, 16, none, None, None, @attention.v_scale, @attention.v_zero_point, 255, float32)
        view_default_2: uint8[B, 5, 2, 8] = view(vnni_linear_default_6, [sym_size_int_1, -1, 2, 8])
        transpose_int_4: uint8[B, 2, 5, 8] = transpose.int(view_default_2, 1, 2)
        int8_attention_default_1: uint8[B, 5, 2, 8] = fxquant_native::int8_attention(transpose_int_2, @attention.q_scale, @attention.q_zero_point, transpose_int_3, @attention.k_scale, @attention.k_zero_point, transpose_int_4, @attention.v_scale, @attention.v_zero_point, None, @attention.softmax_scale, @attention.softmax_zero_point, 255, @out.input_scale, @out.input_zero_point, 255, float32)
        transpose_int_5: uint8[B, 2, 5, 8] = transpose.int(int8_attention_default_1, 1, 2)
        permute_default_2: uint8[B, 5, 2, 8] = permute(transpose_int_5, [0, 2, 1, 3])
        contiguous_default_1: uint8[B, 5, 2, 8] = contiguous(permute_default_2)
        permute_default_3: uint8[B, 2, 5, 8] = permute(contiguous_default_1, [0, 2, 1, 3])
        transpose_int_6: uint8[B, 5, 2, 8] = transpose.int(permute_default_3, 1, 2)
        reshape_default: uint8[B, 5, 16] = reshape(transpose_int_6, [sym_size_int_1, 5, 16])
        vnni_linear_default_3: float32[B, 5, 16] = fxquant_native::vnni_linear(reshape_default, @out.input_scale, @out.input_zero_point, @out.weight_packed_panels, @out.weight_scale, @out.weight_zero_point, @out.weight_packed_sums, @out.bias, 8, 16, none, None, None, None, None, 255, float32)
        return vnni_linear_default_3
        """)  # noqa: E501


@pytest.mark.parametrize("masked", ["bool", "float"])
def test_masks_of_quantized_attention(masked: str) -> None:
    module = quantized_attention(masked)
    assert count(module, native.int8_attention.default) == 1
    assert count(module, torch.ops.fxquant.matmul.default) == 0
