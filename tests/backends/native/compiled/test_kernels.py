"""The compiled kernels against plain arithmetic in int64 and float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fxquant.backends.native import machine
from fxquant.backends.native.compiled import ops as _ops  # noqa: F401  (registers the ops)
from fxquant.backends.native.compiled import weights
from fxquant.numerics.packing import pack
from fxquant.numerics.sqnr import sqnr_db

pytestmark = pytest.mark.skipif(machine.missing_kernels() is not None, reason="there are no compiled kernels here")
native = torch.ops.fxquant_native


class Weight:
    """Random or given codes, and what they stand for."""

    def __init__(self, out: int, inner: int, bits: int, symmetric: bool = False, codes: Tensor | None = None) -> None:
        self.bits = bits
        self.codes = torch.randint(0, 2**bits, (out, inner), dtype=torch.uint8) if codes is None else codes
        middle = torch.full((out, 1), 2 ** (bits - 1), dtype=torch.uint8)
        self.zero_point = middle if symmetric else torch.randint(0, 2**bits, (out, 1), dtype=torch.uint8)
        self.scale = torch.rand(out, 1) + 0.5
        self.packed = pack(self.codes, bits)

    def arguments(self, halves: bool) -> tuple[Any, ...]:
        inner = self.codes.shape[1]
        panels = weights.panels(self.packed, self.bits, inner, halves)
        return panels, self.scale, self.zero_point, weights.sums(self.packed, self.bits, inner)

    def integers(self) -> Tensor:
        return self.codes.to(torch.int64) - self.zero_point.to(torch.int64)


def linear(
    codes: Tensor, scale: Tensor, zero_point: Tensor, weight: Weight, halves: bool = False, **more: Any
) -> Tensor:
    rest = {
        "bias": None,
        "activation": "none",
        "gate": None,
        "residual": None,
        "out_scale": None,
        "out_zero_point": None,
        "qmax": 255,
        "dtype": torch.float32,
    } | more
    bias, *others = rest.values()
    out: Tensor = native.vnni_linear(
        codes, scale, zero_point, *weight.arguments(halves), bias, weight.bits, weight.codes.shape[0], *others
    )
    return out


def expected(codes: Tensor, scale: Tensor, zero_point: Tensor, weight: Weight) -> Tensor:
    sums = (codes.to(torch.int64) - zero_point.to(torch.int64)) @ weight.integers().t()
    return sums.double() * scale.double() * weight.scale.double().flatten()


SHAPES = [(1, 4, 1), (13, 72, 40), (24, 75, 33), (30, 301, 65), (2, 1152, 96), (50, 8, 32)]


@pytest.mark.parametrize("grid", ["one", "sample", "row"])
@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize(("tokens", "inner", "out"), SHAPES)
def test_products_are_exact(tokens: int, inner: int, out: int, bits: int, grid: str) -> None:
    torch.manual_seed(0)
    codes = torch.randint(0, 256, (3, tokens, inner), dtype=torch.uint8)
    shape = {"one": (), "sample": (3, 1, 1), "row": (3, tokens, 1)}[grid]
    scale, zero_point = torch.ones(shape), torch.randint(0, 256, shape, dtype=torch.uint8)
    for symmetric in (True, False):
        for halves in {False, bits <= 4}:
            weight = Weight(out, inner, bits, symmetric)
            weight.scale = torch.ones(out, 1)
            found = linear(codes, scale, zero_point, weight, halves)
            # Numbers of 24 bits are exact in float32, larger ones rounded once.
            assert torch.equal(found, expected(codes, scale, zero_point, weight).float())


@pytest.mark.parametrize("inner", [1152, 4608, weights.MAX_FEATURES])
@pytest.mark.parametrize(("code", "held", "zero_point"), [(255, 255, 0), (255, 0, 255), (0, 255, 255), (255, 255, 255)])
def test_saturating_codes_are_exact(inner: int, code: int, held: int, zero_point: int) -> None:
    codes = torch.full((2, inner), code, dtype=torch.uint8)
    weight = Weight(32, inner, 8, codes=torch.full((32, inner), held, dtype=torch.uint8))
    weight.scale, weight.zero_point = torch.ones(32, 1), torch.full((32, 1), 255 - held, dtype=torch.uint8)
    grid = torch.ones(()), torch.tensor(zero_point, dtype=torch.uint8)
    assert torch.equal(linear(codes, *grid, weight), expected(codes, *grid, weight).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bias_gate_and_residual(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    codes, weight = torch.randint(0, 256, (2, 17, 40), dtype=torch.uint8), Weight(40, 40, 8)
    grid = torch.rand(2, 1, 1) * 1e-3, torch.randint(0, 256, (2, 1, 1), dtype=torch.uint8)
    product = expected(codes, *grid, weight)
    residual, gate = torch.randn(2, 17, 40).to(dtype), torch.randn(2, 1, 40).to(dtype)
    for bias in (None, torch.randn(40), torch.randn(2, 1, 40)):
        for factor in (None, gate, gate[:1, 0, :], gate[0, 0]):
            for added in (None, residual):
                found = linear(codes, *grid, weight, bias=bias, gate=factor, residual=added, dtype=dtype)
                right = product if bias is None else product + bias
                right = right if factor is None else right * factor.double()
                right = right if added is None else right + added.double()
                assert found.dtype == dtype
                torch.testing.assert_close(
                    found, right.to(dtype), rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-4
                )


@pytest.mark.parametrize("activation", ["none", "gelu_tanh", "silu"])
@pytest.mark.parametrize("each", [False, True])
def test_activations_and_codes(activation: str, each: bool) -> None:
    torch.manual_seed(0)
    codes, weight = torch.randint(0, 256, (2, 9, 64), dtype=torch.uint8), Weight(48, 64, 8)
    grid = torch.tensor(2e-4), torch.tensor(120, dtype=torch.uint8)
    functions = {
        "none": lambda x: x,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
        "silu": functional.silu,
    }
    right = functions[activation](expected(codes, *grid, weight))
    values = linear(codes, *grid, weight, activation=activation)
    torch.testing.assert_close(values, right.float(), rtol=1e-5, atol=1e-6)
    shape = (2, 1, 1) if each else ()
    scale, zero_point = torch.rand(shape) * 0.02 + 0.01, torch.randint(0, 200, shape, dtype=torch.uint8)
    found = linear(codes, *grid, weight, activation=activation, out_scale=scale, out_zero_point=zero_point, qmax=250)
    steps = right / scale.double()
    distance = (found.double() - (steps.round() + zero_point.double()).clamp(0, 250)).abs()
    assert found.dtype == torch.uint8
    assert (distance[(steps - steps.floor() - 0.5).abs() > 1e-3] == 0).all()
    assert distance.max() <= 1


def test_extreme_values_pass_activations() -> None:
    weight = Weight(4, 4, 8, codes=torch.eye(4, dtype=torch.uint8) + 128)
    weight.scale, weight.zero_point = torch.ones(4, 1), torch.full((4, 1), 128, dtype=torch.uint8)
    codes = torch.tensor([[255, 0, 128, 129]], dtype=torch.uint8)
    for scale in (1.0, 1e4, 1e30):
        grid = torch.tensor(scale), torch.tensor(128, dtype=torch.uint8)
        right = expected(codes, *grid, weight)
        torch.testing.assert_close(linear(codes, *grid, weight, activation="silu"), functional.silu(right).float())
        found = linear(codes, *grid, weight, activation="gelu_tanh")
        torch.testing.assert_close(found, functional.gelu(right, approximate="tanh").float(), rtol=1e-5, atol=1e-5)
    grid = torch.tensor(float("nan")), torch.tensor(128, dtype=torch.uint8)
    assert linear(codes, *grid, weight, activation="silu").isnan().all()


def test_no_tokens() -> None:
    codes = torch.zeros(2, 0, 64, dtype=torch.uint8)
    assert linear(codes, torch.ones(()), torch.zeros((), dtype=torch.uint8), Weight(40, 64, 8)).shape == (2, 0, 40)


def test_what_does_not_fit_is_refused() -> None:
    codes, one, zero = torch.zeros(2, 3, 64, dtype=torch.uint8), torch.ones(()), torch.zeros((), dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="in panels is"):
        linear(codes, one, zero, Weight(40, 32, 8))
    with pytest.raises(RuntimeError, match=r"scale of the codes .* does not fit|leading axes"):
        linear(codes, torch.ones(3), zero, Weight(40, 64, 8))
    with pytest.raises(RuntimeError, match="the gate"):
        linear(codes, one, zero, Weight(40, 64, 8), gate=torch.ones(39))


@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 0), (3, 0), (4, 8), (8, 16), (4, 32)])
@pytest.mark.parametrize("rows", [1, 2, 6, 7, 23])
def test_weight_only(bits: int, group: int, rows: int) -> None:
    torch.manual_seed(0)
    inner, out = 75, 40
    weight, groups = Weight(out, inner, bits), -(-inner // group) if group else 1
    scale, zero_point = torch.rand(out, groups) + 0.5, torch.randint(0, 2**bits, (out, groups), dtype=torch.uint8)
    x, bias = torch.randn(rows, inner), torch.randn(out)
    spread = [value.repeat_interleave(group or inner, 1)[:, :inner].double() for value in (scale, zero_point)]
    right = x.double() @ ((weight.codes.double() - spread[1]) * spread[0]).t() + bias
    for halves in {False, bits <= 4}:
        panels = weights.panels(weight.packed, bits, inner, halves)
        found = native.weight_only_linear(x, panels, scale, zero_point, bias, bits, group, out)
        assert sqnr_db(right, found) > 120.0


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize(("out", "inner"), [(1, 1), (40, 75), (32, 8), (65, 64)])
def test_panels_lead_back(out: int, inner: int, halves: bool) -> None:
    for bits in range(2, 5 if halves else 9):
        weight = Weight(out, inner, bits)
        panels = weights.panels(weight.packed, bits, inner, halves)
        assert panels.dtype == (torch.uint8 if halves else torch.int8)
        assert torch.equal(weights.unpacked(panels, bits, out, inner), weight.packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("channels", [16, 75])
def test_norms(dtype: torch.dtype, centered: bool, channels: int) -> None:
    torch.manual_seed(0)
    x = (torch.randn(2, 5, channels) * 3 + 1).to(dtype)
    weight, bias = (torch.randn(channels).to(dtype) for _ in range(2))
    factor, shift = (torch.randn(2, 1, channels).to(dtype) for _ in range(2))
    scale, zero_point = torch.full((2, 1, 1), 0.05), torch.tensor([100, 140], dtype=torch.uint8).reshape(2, 1, 1)
    if centered:
        y = functional.layer_norm(x.double(), [channels], weight.double(), bias.double(), 1e-6)
    else:
        y = functional.rms_norm(x.double(), [channels], weight.double(), 1e-6) + bias.double()
    y = (y * (factor.double() + 1) + shift.double()) / 0.05
    found = native.norm_quantize(x, centered, 1e-6, weight, bias, factor, 1.0, shift, scale, zero_point, 255)
    distance = (found.double() - (y.round() + zero_point).clamp(0, 255)).abs()
    assert (distance[(y - y.floor() - 0.5).abs() > 1e-3] == 0).all()


def masks(kind: str, batch: int, queries: int, keys: int) -> Tensor | None:
    if kind == "float":
        return torch.randn(batch, 1, queries, keys)
    return torch.rand(1, 1, queries, keys) > 0.3 if kind == "bool" else None


ATTENTIONS = [
    (2, 4, 4, 33, 33, 72),
    (1, 3, 3, 13, 7, 40),
    (2, 4, 2, 5, 33, 17),
    (1, 2, 1, 1, 1, 16),
    (1, 1, 1, 20, 100, 128),
]


@pytest.mark.parametrize("mask", ["none", "float", "bool", "causal"])
@pytest.mark.parametrize(("batch", "heads", "shared", "queries", "keys", "depth"), ATTENTIONS)
def test_attention_of_floats(
    batch: int, heads: int, shared: int, queries: int, keys: int, depth: int, mask: str
) -> None:
    if not machine.has_bf16_products():
        pytest.skip("this processor does not multiply bfloat16")
    torch.manual_seed(0)
    q = torch.randn(batch, queries, heads, depth).transpose(1, 2)
    k, v = (torch.randn(batch, keys, shared, depth).transpose(1, 2) for _ in range(2))
    given, causal = masks(mask, batch, queries, keys), mask == "causal"
    wide = given.double() if given is not None and given.is_floating_point() else given
    right = functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), wide, is_causal=causal, enable_gqa=heads != shared
    )
    found = native.bf16_attention(q, k, v, given, causal, depth**-0.5, None, None, 255).transpose(1, 2)
    assert sqnr_db(right, found) > 40.0
    grid = torch.tensor(0.02), torch.tensor(128, dtype=torch.uint8)
    codes = native.bf16_attention(q, k, v, given, causal, depth**-0.5, *grid, 255).transpose(1, 2)
    assert torch.equal(codes, ((found / 0.02).round() + 128).clamp(0, 255).to(torch.uint8))


def test_attention_of_bfloat16_writes_float32() -> None:
    if not machine.has_bf16_products():
        pytest.skip("this processor does not multiply bfloat16")
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 9, 24, dtype=torch.bfloat16) for _ in range(3))
    given = (None, False, 0.2, None, None, 255)
    found = native.bf16_attention(q, k, v, *given, torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found.bfloat16(), native.bf16_attention(q, k, v, *given))
    right = functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=0.2).transpose(1, 2)
    assert sqnr_db(right, found) > 45.0
    with pytest.raises(RuntimeError, match="writes bfloat16 or float32, and any other its own dtype, not Half"):
        native.bf16_attention(q, k, v, *given, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_writes_codes_and_values(dtype: torch.dtype) -> None:
    if not machine.has_bf16_products():
        pytest.skip("this processor does not multiply bfloat16")
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 9, 24, dtype=dtype) for _ in range(3))
    given, grid = (None, False, 0.2), (torch.tensor(0.02), torch.tensor(128, dtype=torch.uint8), 255)
    codes, values = native.bf16_attention_values(q, k, v, *given, *grid)
    assert torch.equal(codes, native.bf16_attention(q, k, v, *given, *grid))
    assert torch.equal(values, native.bf16_attention(q, k, v, *given, None, None, 255).bfloat16())
    with pytest.raises(RuntimeError, match="values are written beside codes"):
        native.bf16_attention_values(q, k, v, *given, None, None, 255)


def coded(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = (high - low) / 255
    zero_point = (-low / scale).round()
    return ((x / scale).round() + zero_point).clamp(0, 255).to(torch.uint8), scale, zero_point.to(torch.uint8)


@pytest.mark.parametrize("mask", ["none", "float", "bool"])
@pytest.mark.parametrize(("batch", "heads", "shared", "queries", "keys", "depth"), ATTENTIONS)
def test_attention_of_codes(
    batch: int, heads: int, shared: int, queries: int, keys: int, depth: int, mask: str
) -> None:
    torch.manual_seed(0)
    q = coded(torch.randn(batch, queries, heads, depth).transpose(1, 2) * depth**-0.5)
    k, v = (coded(torch.randn(batch, keys, shared, depth).transpose(1, 2)) for _ in range(2))
    given = masks(mask, batch, queries, keys)
    integers = [(codes.double() - zero_point.double()) for codes, _, zero_point in (q, k, v)]
    integers[1:] = (value.repeat_interleave(heads // shared, 1) for value in integers[1:])
    scores = integers[0] @ integers[1].transpose(-1, -2) * q[1].double() * k[1].double()
    if given is not None:
        scores = scores + given if given.is_floating_point() else scores.masked_fill(~given, -torch.inf)
    steps = torch.nan_to_num(scores.softmax(-1)) * 255
    right = steps.round() @ integers[2] / 255 * v[1].double()
    one = torch.tensor(1 / 255), torch.tensor(0, dtype=torch.uint8)
    found = native.int8_attention(*q, *k, *v, given, *one, 255, None, None, 255, torch.float32).transpose(1, 2)
    certain = ((steps - steps.floor() - 0.5).abs() > 1e-3).all(-1)  # Rows without a probability between two codes.
    torch.testing.assert_close(found[certain], right.float()[certain], rtol=1e-5, atol=1e-5)
    assert sqnr_db(right, found) > 40.0


def test_a_row_that_sees_nothing_is_zero() -> None:
    q, k, v = (torch.randn(1, 2, 3, 16) for _ in range(3))
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    mask[..., 1, :] = False
    one = torch.tensor(1 / 255), torch.tensor(0, dtype=torch.uint8)
    found = native.int8_attention(
        *coded(q), *coded(k), *coded(v), mask, *one, 255, None, None, 255, torch.float32
    ).transpose(1, 2)
    assert (found[:, :, 1] == 0).all()
    assert (found[:, :, 0] != 0).any()
    if machine.has_bf16_products():
        found = native.bf16_attention(q, k, v, mask, False, 0.25, None, None, 255).transpose(1, 2)
        assert (found[:, :, 1] == 0).all()
