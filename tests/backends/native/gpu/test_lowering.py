"""Graphs before and after lowering to the Triton kernels, and back to what a checkpoint holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxquant
from fxquant.backends.native import Native
from fxquant.backends.native.gpu import machine
from fxquant.errors import BackendError
from fxquant.ir.attention import find_attentions
from fxquant.ir.stages import verify
from fxquant.ir.tensors import read_tensors
from fxquant.numerics.sqnr import sqnr_db
from fxquant.pipeline.pipeline import Pipeline
from fxquant.planning.decisions import ActivationRange, AttentionPlan, LayerPlan
from fxquant.planning.plan import Plan
from tests.support import captured, count, golden, outputs, text
from tests.tiny import calibrate, inputs, make_dit

CPU = torch.device("cpu")
MISSING = machine.missing(CPU)
pytestmark = [
    pytest.mark.skipif(MISSING is not None, reason=f"no interpreter: {MISSING}"),
]
native, reference = torch.ops.fxquant_native, torch.ops.fxquant


class Block(nn.Module):
    """A modulated feed-forward with a gate, as in a diffusion transformer."""

    def __init__(self, approximate: str = "tanh", shared: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(32, 96), nn.Linear(96, 32, bias=False)
        self.approximate, self.shared = approximate, shared

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = c.chunk(3, 1)
        y = functional.layer_norm(x, [32], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
        y = self.up(y)
        z = self.down(functional.gelu(y, approximate=self.approximate))
        z = x + gate[:, None] * z
        return z + y[..., :32] if self.shared else z


class Attention(nn.Module):
    def __init__(self, masked: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.masked = masked

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(x.shape[0], -1, 2, 8).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mask = (x[:, None, :1, :1] * torch.arange(5.0)).expand(-1, 1, 5, 5) > -1.0 if self.masked else None
        return self.out(functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(x.shape))


def plan_for(shapes: dict[str, list[int]], bits: int, method: str = "minmax", group: int = 0) -> Plan:
    plan = Plan("", "", None)
    for name, shape in shapes.items():
        plan.layers[name] = LayerPlan(
            "linear", "block", shape, bits, 8, group_size=group, activation=ActivationRange(-2.0, 2.0, method)
        )
    return plan


def lowered(
    model: nn.Module,
    plan: Plan,
    *inputs: Tensor,
    passes: str = "quantize-linears",
    floor: float = 100.0,
    **options: str,
) -> torch.fx.GraphModule:
    """Checked against the quantized graph, and that the way back finds its tensors."""
    module = captured(model, *inputs).module
    Pipeline.parse(passes).run(module, plan)
    expected, before = outputs(module, *inputs), {name: t.clone() for name, t in read_tensors(module).items()}
    backend = Native("triton", **options)  # type: ignore[arg-type]
    backend.finish(module, plan)
    verify(module, Native.spec)
    (found,), (right,) = outputs(module, *inputs), expected
    assert sqnr_db(right, found) > floor
    back = backend.stored(module)
    assert back.keys() == before.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in before.items())
    return module


def block(
    model: nn.Module | None = None,
    bits: int = 8,
    method: str = "minmax",
    group: int = 0,
    format: str | None = None,
    **more: object,
) -> torch.fx.GraphModule:
    plan = plan_for({"up": [96, 32], "down": [32, 96]}, bits, method, group)
    for layer in plan.layers.values():
        layer.weight_format = layer.activation_format = format
    return lowered(model or Block(), plan, torch.randn(2, 5, 32), torch.randn(2, 96), **more)  # type: ignore[arg-type]


def test_a_block_is_three_kernels() -> None:
    assert text(block(bits=4)) == golden("""
        x: float32[B, 5, 32]
        c: float32[B, 96]
        chunk = chunk(c, 3, 1)
        getitem: float32[B, 32] = getitem(chunk, 0)
        getitem_1: float32[B, 32] = getitem(chunk, 1)
        getitem_2: float32[B, 32] = getitem(chunk, 2)
        slice_1: float32[B, 32] = slice.Tensor(getitem_1, 0, 0, 9223372036854775807)
        unsqueeze: float32[B, 1, 32] = unsqueeze(slice_1, 1)
        slice_2: float32[B, 32] = slice.Tensor(getitem, 0, 0, 9223372036854775807)
        unsqueeze_1: float32[B, 1, 32] = unsqueeze(slice_2, 1)
        triton_norm_quantize_default: int8[B, 5, 32] = fxquant_native::triton_norm_quantize(x, True, 1e-06, None, None, unsqueeze, 1.0, unsqueeze_1, @up.input_scale, @up.input_zero_point, 255, int8)
        triton_linear_default_3: int8[B, 5, 96] = fxquant_native::triton_linear(triton_norm_quantize_default, @up.input_scale, @up.input_zero_point, @up.weight_packed_rows, @up.weight_scale, @up.weight_zero_point, @up.weight_packed_sums, @up.bias, 4, 96, gelu_tanh, None, None, @down.input_scale, @down.input_zero_point, 255, float32, 0, None, None)
        slice_3: float32[B, 32] = slice.Tensor(getitem_2, 0, 0, 9223372036854775807)
        unsqueeze_2: float32[B, 1, 32] = unsqueeze(slice_3, 1)
        triton_linear_default_5: float32[B, 5, 32] = fxquant_native::triton_linear(triton_linear_default_3, @down.input_scale, @down.input_zero_point, @down.weight_packed_rows, @down.weight_scale, @down.weight_zero_point, @down.weight_packed_sums, None, 4, 32, none, unsqueeze_2, x, None, None, 255, float32, 0, None, None)
        return triton_linear_default_5
        """)  # noqa: E501


@pytest.mark.parametrize("bits", [2, 4, 7, 8])
@pytest.mark.parametrize("packed", [True, False])
def test_weights_of_few_bits_stay_packed(bits: int, packed: bool) -> None:
    held = read_tensors(block(bits=bits, packed=packed))["down.weight_packed_rows"]
    halves = packed and bits <= 4
    assert held.dtype == (torch.uint8 if halves else torch.int8)
    assert held.shape == ((32, 64) if halves else (32, 96))


@pytest.mark.parametrize("packed", [True, False])
def test_weights_in_groups(packed: bool) -> None:
    module = block(bits=4, group=32, packed=packed)
    assert count(module, native.triton_linear.default) == 2


def test_sums_of_inputs_are_made_where_weights_need_them() -> None:
    module = block(bits=8)
    assert count(module, native.triton_norm_quantize_sums.default) == 1
    assert count(module, native.triton_linear_sums.default) == 1
    for module in (block(bits=7), block(bits=8, passes="quantize-linears{symmetric=True}")):
        assert count(module, native.triton_norm_quantize.default) == 1
        assert count(module, native.triton_linear.default) == 2


@pytest.mark.parametrize(
    "model",
    [
        Block(approximate="none"),  # The exact GELU is another function.
        Block(shared=True),  # The linear has another reader.
    ],
    ids=["exact", "shared"],
)
def test_what_others_read_or_kernels_lack_stays(model: nn.Module) -> None:
    module = block(model)
    assert count(module, native.triton_linear.default) == 2
    assert count(module, native.triton_quantize_sums.default) == 1


def test_grids_of_tokens_are_found_by_who_makes_their_codes() -> None:
    assert text(block(method="dynamic")) == golden("""
        x: float32[B, 5, 32]
        c: float32[B, 96]
        chunk = chunk(c, 3, 1)
        getitem: float32[B, 32] = getitem(chunk, 0)
        getitem_1: float32[B, 32] = getitem(chunk, 1)
        getitem_2: float32[B, 32] = getitem(chunk, 2)
        slice_1: float32[B, 32] = slice.Tensor(getitem_1, 0, 0, 9223372036854775807)
        unsqueeze: float32[B, 1, 32] = unsqueeze(slice_1, 1)
        slice_2: float32[B, 32] = slice.Tensor(getitem, 0, 0, 9223372036854775807)
        unsqueeze_1: float32[B, 1, 32] = unsqueeze(slice_2, 1)
        triton_norm_quantize_tokens_default = fxquant_native::triton_norm_quantize_tokens(x, True, 1e-06, None, None, unsqueeze, 1.0, unsqueeze_1, 255, int8)
        getitem_3: int8[B, 5, 32] = getitem(triton_norm_quantize_tokens_default, 0)
        getitem_9: int32[B, 5, 1] = getitem(triton_norm_quantize_tokens_default, 3)
        getitem_4: float32[B, 5, 1] = getitem(triton_norm_quantize_tokens_default, 1)
        getitem_5: uint8[B, 5, 1] = getitem(triton_norm_quantize_tokens_default, 2)
        triton_linear_default_2: float32[B, 5, 96] = fxquant_native::triton_linear(getitem_3, getitem_4, getitem_5, @up.weight_packed_rows, @up.weight_scale, @up.weight_zero_point, @up.weight_packed_sums, @up.bias, 8, 96, gelu_tanh, None, None, None, None, 255, float32, 0, @up.weight_packed_offset, getitem_9)
        triton_quantize_tokens_default_1 = fxquant_native::triton_quantize_tokens(triton_linear_default_2, 255, int8)
        getitem_6: int8[B, 5, 96] = getitem(triton_quantize_tokens_default_1, 0)
        getitem_10: int32[B, 5, 1] = getitem(triton_quantize_tokens_default_1, 3)
        getitem_7: float32[B, 5, 1] = getitem(triton_quantize_tokens_default_1, 1)
        getitem_8: uint8[B, 5, 1] = getitem(triton_quantize_tokens_default_1, 2)
        slice_3: float32[B, 32] = slice.Tensor(getitem_2, 0, 0, 9223372036854775807)
        unsqueeze_2: float32[B, 1, 32] = unsqueeze(slice_3, 1)
        triton_linear_default_4: float32[B, 5, 32] = fxquant_native::triton_linear(getitem_6, getitem_7, getitem_8, @down.weight_packed_rows, @down.weight_scale, @down.weight_zero_point, @down.weight_packed_sums, None, 8, 32, none, unsqueeze_2, x, None, None, 255, float32, 0, @down.weight_packed_offset, getitem_10)
        return triton_linear_default_4
        """)  # noqa: E501


class Told(nn.Module):
    """A linear of token grids that hands back what else it is told to."""

    def __init__(self, told: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.told = told
        self.register_buffer("packed", torch.randint(0, 256, (24, 32), dtype=torch.uint8))
        self.register_buffer("step", torch.full((24, 1), 0.01))
        self.register_buffer("zero", torch.full((24, 1), 128, dtype=torch.uint8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        both = reference.token_grid(x, "int8")
        scale, zero_point = both[0], both[1]
        codes = reference.quantize(x, scale, zero_point, "int8")
        grid = (self.packed, self.step, self.zero)
        y = reference.linear(codes, scale, zero_point, *grid, None, "int8", "int8", 0, torch.float32)
        return y, {"nothing": y, "codes": codes, "scale": scale, "zero point": zero_point}[self.told]


@pytest.mark.parametrize("told", ["nothing", "codes", "scale", "zero point"])
def test_grids_of_tokens_that_others_read_stay(told: str) -> None:
    x = torch.randn(2, 5, 32)
    module = captured(Told(told), x).module
    expected = outputs(module, x)
    Native("triton").finish(module, Plan("", "", None))
    assert count(module, native.triton_quantize_tokens.default) == (told == "nothing")
    assert count(module, reference.token_grid.default) == (told != "nothing")
    for right, found in zip(expected, outputs(module, x), strict=True):
        assert sqnr_db(right.double(), found.double()) > 100.0


@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_alone(bits: int, group: int) -> None:
    plan = plan_for({"up": [96, 32], "down": [32, 96]}, bits, group=group)
    for layer in plan.layers.values():
        layer.activation_bits, layer.activation = None, None
    module = lowered(Block(), plan, torch.randn(2, 5, 32), torch.randn(2, 96))
    assert count(module, native.triton_weight_only_linear.default) == 2
    assert count(module, reference.dequantize_weight.default) == 0


def test_groups_that_the_kernel_of_weights_alone_lacks_are_dequantized() -> None:
    plan = plan_for({"up": [96, 32], "down": [32, 96]}, 4, group=16)
    for layer in plan.layers.values():
        layer.activation_bits, layer.activation = None, None
    module = lowered(Block(), plan, torch.randn(2, 5, 32), torch.randn(2, 96))
    assert count(module, reference.dequantize_weight.default) == 2
    assert Native("triton").kernel(plan.layers["up"]) == "dequantize + aten float"


@pytest.mark.parametrize("method", ["minmax", "dynamic"])
def test_8_bit_floats(method: str) -> None:
    module = block(bits=8, format="fp8", method=method, floor=40.0 if method == "minmax" else 45.0)
    tensors = read_tensors(module)
    assert tensors["up.weight_packed_fp8"].dtype == torch.float8_e4m3fn
    found = {str(node.target) for node in module.graph.nodes if node.op == "call_function"}
    assert not found & {"fxquant.quantize.default", "fxquant.token_scale.default", "fxquant.linear.default"}
    assert count(module, native.triton_row_sums.default) == 0
    fused = native.triton_norm_quantize if method == "minmax" else native.triton_norm_quantize_tokens
    assert count(module, fused.default) == 1
    assert count(module, native.triton_quantize.default) == 0


@pytest.mark.parametrize("masked", [False, True])
def test_an_attention_of_codes_is_one_kernel(masked: bool) -> None:
    plan = plan_for({name: [16, 16] for name in ("q", "k", "v", "out")}, 8)
    model, x = Attention(masked), torch.randn(2, 5, 16)
    (found,) = find_attentions(captured(model, x).module.graph)
    plan.attentions[found.name] = AttentionPlan(
        bits=8, ranges={side: ActivationRange(-1.5, 1.5, "minmax") for side in "qkv"}, softmax_bits=8
    )
    module = lowered(model, plan, x, passes="quantize-linears,quantize-attention", floor=45.0)
    assert count(module, native.triton_attention.default) == 1
    assert count(module, reference.matmul.default) == 0
    # q, k, v and the result leave their kernels as codes.
    assert count(module, native.triton_quantize_sums.default) == 1


# --- models ---------------------------------------------------------------------------------------------------------


def compiled(recipe: str, backend: object) -> fxquant.GraphModel:
    model = make_dit(sample_size=4)  # Few tokens, because the interpreter is slow.
    return fxquant.compile(model, recipe=recipe, backend=backend, calibrate=calibrate(model, size=4), measure=0)  # type: ignore[arg-type]


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    "recipe", [pytest.param("htg-wfp8afp8", marks=pytest.mark.exhaustive), "rtn-wfp8afp8", "rtn-dynamic-wfp8afp8"]
)
def test_a_model_of_8_bit_floats(recipe: str, tmp_path: Path) -> None:
    ours, oracle = compiled(recipe, Native("triton")), compiled(recipe, "fake-quant")
    call = inputs(3, timestep=None, size=4)
    expected = ours(**call).sample
    assert sqnr_db(oracle(**call).sample, expected) > 35.0  # A code at a tie moves by 6 % of its value.
    assert "native triton e4m3 x e4m3" in {layer.kernel for layer in fxquant.report(ours).layers}
    fxquant.save(ours, tmp_path / "model")
    loaded = fxquant.load(tmp_path / "model", backend=Native("triton"))
    assert torch.equal(loaded(**call).sample, expected)
    plain = fxquant.load(tmp_path / "model", backend="fake-quant")
    assert torch.equal(plain(**call).sample, oracle(**call).sample)


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ("w8afp8", "fp8 by fp8, not fp8 by int8; choose wfp8afp8"),
        ("wfp8afp8-g8", "one fp8 scale per output channel, not per group"),
        ("wfp8afp8-tensor", "output channels of its weight share scales"),
        ("wfp8e5m2afp8e5m2", "take fp8, int2, .*int8; choose one of these"),
    ],
)
def test_8_bit_floats_that_no_kernel_takes_are_refused(precision: str, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        compiled(f"rtn-{precision}", Native("triton"))


def test_groups_that_no_kernel_takes_are_refused() -> None:
    with pytest.raises(BackendError, match="groups of a multiple of 32 inputs"):
        compiled("rtn-w4a8-g8", Native("triton"))
    with pytest.raises(BackendError, match="weights of up to 7 bits"):
        block(bits=8, group=32)
