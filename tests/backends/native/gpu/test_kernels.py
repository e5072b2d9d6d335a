"""The Triton kernels against plain arithmetic in int64 and float64: on a GPU if there is one, else interpreted."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fxquant.backends.native.gpu import machine, weights
from fxquant.backends.native.gpu import ops as _ops  # noqa: F401  (registers the ops)
from fxquant.backends.native.gpu.configs import candidates, trying
from fxquant.backends.native.gpu.products import linear as linear_of_config
from fxquant.backends.native.gpu.rows import quantize
from fxquant.errors import BackendError
from fxquant.numerics import grids
from fxquant.numerics.packing import pack
from fxquant.numerics.sqnr import sqnr_db
from tests.sampling import covering

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MISSING = machine.missing(DEVICE)
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"no Triton kernels: {MISSING}")
native = torch.ops.fxquant_native
FP8 = torch.float8_e4m3fn


class Weight:
    """Random or given codes, and what they stand for."""

    def __init__(self, out: int, inner: int, bits: int, group: int = 0, symmetric: bool = False) -> None:
        self.bits, self.group, self.inner = bits, group, inner
        self.codes = torch.randint(0, 2**bits, (out, inner), dtype=torch.uint8)
        shape = (out, -(-inner // group) if group else 1)
        middle = torch.full(shape, 2 ** (bits - 1), dtype=torch.uint8)
        self.zero_point = middle if symmetric else torch.randint(0, 2**bits, shape, dtype=torch.uint8)
        self.scale = torch.rand(shape) + 0.5 if group else torch.ones(shape)

    def kernel_codes(self, halves: bool) -> Tensor:
        return weights.kernel_codes(
            pack(self.codes, self.bits), self.zero_point, self.bits, self.inner, halves, self.group
        )

    def real(self) -> Tensor:
        each = self.group or self.inner
        scale, zero_point = (
            value.double().repeat_interleave(each, 1)[:, : self.inner] for value in (self.scale, self.zero_point)
        )
        return scale * (self.codes.double() - zero_point)


def linear(codes: Tensor, scale: Tensor, zero_point: Tensor, weight: Weight, halves: bool = False, **more: Any) -> Any:
    """The op on the device, from codes of 0 to 255."""
    rest: dict[str, Any] = {
        "bias": None,
        "bits": weight.bits,
        "out": weight.codes.shape[0],
        "activation": "none",
        "gate": None,
        "residual": None,
        "out_scale": None,
        "out_zero_point": None,
        "qmax": 255,
        "dtype": torch.float32,
        "group": weight.group,
    }
    config, op = more.pop("config", None), more.pop("op", native.triton_linear)
    packed = pack(weight.codes, weight.bits)
    sums = weights.sums(packed, weight.scale, weight.zero_point, weight.bits, weight.inner, weight.group)
    xq = native.signed(codes).to(DEVICE)
    offset = weights.offset(weight.zero_point, weight.bits)
    row_sums = None if offset is None else native.triton_row_sums(xq)
    grid = (xq, scale, zero_point, weight.kernel_codes(halves), weight.scale, weight.zero_point, sums)
    arguments = [*grid, *(rest | more).values(), offset, row_sums]
    moved = [value.to(DEVICE) if isinstance(value, Tensor) else value for value in arguments]
    out = op(*moved) if config is None else linear_of_config(*moved, config=config)
    return out.cpu() if isinstance(out, Tensor) else tuple(part.cpu() for part in out)


def expected(codes: Tensor, scale: Tensor, zero_point: Tensor, weight: Weight) -> Tensor:
    return (codes.double() - zero_point.double()) @ weight.real().t() * scale.double()


SHAPES = [(1, 4, 1), (13, 72, 40), (70, 301, 65), (2, 1152, 96)]


@pytest.mark.parametrize(
    ("tokens", "inner", "out", "bits", "grid"), covering(SHAPES, [2, 4, 6, 8], ["one", "sample", "row"])
)
def test_products_are_exact(tokens: int, inner: int, out: int, bits: int, grid: str) -> None:
    torch.manual_seed(0)
    codes = torch.randint(0, 256, (3, tokens, inner), dtype=torch.uint8)
    shape = {"one": (), "sample": (3, 1, 1), "row": (3, tokens, 1)}[grid]
    scale, zero_point = torch.ones(shape), torch.randint(0, 256, shape, dtype=torch.uint8)
    for symmetric in (True, False):
        for halves in {False, bits <= 4}:
            weight = Weight(out, inner, bits, symmetric=symmetric)
            # Numbers of 24 bits are exact in float32, larger ones rounded once.
            found = linear(codes, scale, zero_point, weight, halves)
            assert torch.equal(found, expected(codes, scale, zero_point, weight).float())


@pytest.mark.parametrize(
    ("tokens", "inner", "out", "bits", "halves", "group"),
    covering(
        [(1, 32, 4), (13, 300, 65), (70, 256, 40)],
        [(2, True), (4, True), (4, False), (6, False)],
        [32, 64, 96, 128],
    ),
)
def test_groups(tokens: int, inner: int, out: int, bits: int, halves: bool, group: int) -> None:
    torch.manual_seed(0)
    codes = torch.randint(0, 256, (tokens, inner), dtype=torch.uint8)
    weight, grid = Weight(out, inner, bits, group), (torch.tensor(0.01), torch.tensor(99, dtype=torch.uint8))
    assert sqnr_db(expected(codes, *grid, weight), linear(codes, *grid, weight, halves)) > 125.0


@pytest.mark.parametrize("inner", [1152, weights.MAX_FEATURES])
@pytest.mark.parametrize(("code", "held", "zero_point"), [(255, 255, 0), (255, 0, 255), (0, 255, 255), (255, 255, 255)])
def test_saturating_codes_are_exact(inner: int, code: int, held: int, zero_point: int) -> None:
    codes, weight = torch.full((2, inner), code, dtype=torch.uint8), Weight(16, inner, 8)
    weight.codes.fill_(held)
    weight.zero_point.fill_(255 - held)
    grid = torch.ones(()), torch.tensor(zero_point, dtype=torch.uint8)
    assert torch.equal(linear(codes, *grid, weight), expected(codes, *grid, weight).float())


@pytest.mark.slow
@pytest.mark.parametrize("halves", [False, True])
def test_every_way_to_cut_a_product(halves: bool) -> None:
    torch.manual_seed(0)
    codes, weight = torch.randint(0, 256, (150, 140), dtype=torch.uint8), Weight(270, 140, 4)
    grid = torch.ones(()), torch.tensor(3, dtype=torch.uint8)
    right = expected(codes, *grid, weight).float()
    kind = "int4" if halves else "int8"
    ways = {way for one in (kind, f"{kind}-g64") for rows in (16, 4096) for way in candidates(one, rows)}
    for config in ways:
        assert torch.equal(linear(codes, *grid, weight, halves, config=config), right), config


FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_bias_gate_and_residual(dtype: torch.dtype, every: bool) -> None:
    """Every combination with every dtype, or each with one dtype."""
    torch.manual_seed(0)
    codes, weight = torch.randint(0, 256, (2, 17, 40), dtype=torch.uint8), Weight(40, 40, 8)
    grid = torch.rand(2, 1, 1) * 1e-3, torch.randint(0, 256, (2, 1, 1), dtype=torch.uint8)
    product = expected(codes, *grid, weight)
    residual, gates = torch.randn(2, 17, 40).to(dtype), torch.randn(2, 3, 40).to(dtype)
    gate = gates[:, 1:2]  # Vectors of samples that do not follow one another in memory.
    biases = (None, torch.randn(40), torch.randn(2, 1, 40))
    factors = (None, gate, gate[:1, 0, :], gate[0, 0])
    for number, (bias, factor, added) in enumerate(itertools.product(biases, factors, (None, residual))):
        if not every and number % 3 != FLOATS.index(dtype):
            continue
        found = linear(codes, *grid, weight, bias=bias, gate=factor, residual=added, dtype=dtype)
        right = product if bias is None else product + bias
        right = right if factor is None else right * factor.double()
        right = right if added is None else right + added.double()
        assert found.dtype == dtype
        torch.testing.assert_close(found, right.to(dtype), rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-4)


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
    distance = (found.double() + 128 - (steps.round() + zero_point.double()).clamp(0, 250)).abs()
    assert found.dtype == torch.int8
    assert (distance[(steps - steps.floor() - 0.5).abs() > 1e-3] == 0).all()
    assert distance.max() <= 1


def test_extreme_values_pass_activations() -> None:
    weight = Weight(4, 4, 8, symmetric=True)
    weight.codes = torch.eye(4, dtype=torch.uint8) + 128
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
    none, shift = torch.zeros(0, 5, 64, device=DEVICE), torch.zeros(0, 1, 64, device=DEVICE)
    norm = (True, 1e-5, None, None, shift, 1.0, shift)
    grid = torch.ones((), device=DEVICE), torch.zeros((), dtype=torch.uint8, device=DEVICE)
    assert native.triton_norm_quantize(none, *norm, *grid, 255, torch.int8).shape == (0, 5, 64)
    shapes = [part.shape for part in native.triton_norm_quantize_tokens(none, *norm, 255, torch.int8)]
    assert shapes == [(0, 5, 64), *[(0, 5, 1)] * 3]


def test_codes_that_do_not_lie_in_order() -> None:
    torch.manual_seed(0)
    codes, weight = torch.randint(0, 256, (64, 13), dtype=torch.uint8).t(), Weight(40, 64, 8)
    grid = torch.ones(()), torch.tensor(7, dtype=torch.uint8)
    assert torch.equal(linear(codes, *grid, weight), expected(codes, *grid, weight).float())


def test_what_does_not_fit_is_refused() -> None:
    codes, one, zero = torch.zeros(2, 3, 64, dtype=torch.uint8), torch.ones(()), torch.zeros((), dtype=torch.uint8)
    with pytest.raises(BackendError, match="must be contiguous"):
        linear(codes, one, zero, Weight(40, 32, 8))
    with pytest.raises(BackendError, match="scale of the codes"):
        linear(codes, torch.ones(3), zero, Weight(40, 64, 8))
    with pytest.raises(BackendError, match="the gate"):
        linear(codes, one, zero, Weight(40, 64, 8), gate=torch.ones(39))
    with pytest.raises(BackendError, match="residual"):
        linear(codes, one, zero, Weight(40, 64, 8), residual=torch.ones(2, 3, 39))
    with pytest.raises(BackendError, match="activation="):
        linear(codes, one, zero, Weight(40, 64, 8), activation="relu")
    with pytest.raises(BackendError, match="reads float32"):
        native.triton_quantize(torch.zeros(4, dtype=torch.float64, device=DEVICE), one, zero, 255, torch.int8)
    with pytest.raises(BackendError, match=r"on .* and on meta"):
        quantize(torch.zeros(4, device=DEVICE), one.to("meta"), zero.to(DEVICE), 255, torch.int8)


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("group", [0, 32, 96])
@pytest.mark.parametrize(("out", "inner"), [(1, 1), (40, 75), (32, 8), (65, 300)])
def test_rows_lead_back(out: int, inner: int, group: int, halves: bool) -> None:
    for bits in range(2, 5 if halves else 8 if group else 9):
        weight = Weight(out, inner, bits, group)
        rows = weight.kernel_codes(halves)
        assert rows.dtype == (torch.uint8 if halves else torch.int8)
        assert rows.shape == (out, weights.held_width(inner, halves, group))
        assert torch.equal(weights.unpacked(rows, weight.zero_point, bits, inner, group), pack(weight.codes, bits))


# --- float activations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "inner", "out", "bits", "halves", "group", "dtype"),
    covering([(1, 64, 40), (70, 301, 65)], [(8, False), (6, False), (4, True)], [0, 32, 96], FLOATS),
)
def test_products_of_float_activations(
    rows: int, inner: int, out: int, bits: int, halves: bool, group: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight = Weight(out, inner, bits, group)
    x, bias = torch.randn(rows, inner).to(dtype), torch.randn(out).to(dtype)
    for added in (None, bias):
        arguments = (x, weight.kernel_codes(halves), weight.scale, weight.zero_point, added, bits, group, out)
        moved = [value.to(DEVICE) if isinstance(value, Tensor) else value for value in arguments]
        found = native.triton_weight_only_linear(*moved).cpu()
        right = x.double() @ weight.real().t() + (0.0 if added is None else added.double())
        assert found.dtype == dtype
        # The interpreter cuts what bfloat16 has no bits for off, which doubles the error of rounding.
        assert sqnr_db(right, found) > {torch.float32: 110.0, torch.bfloat16: 46.0, torch.float16: 66.0}[dtype]


def test_float_activations_that_do_not_fit_are_refused() -> None:
    weight = Weight(40, 64, 8)
    x, held, grid = torch.zeros(2, 64), weight.kernel_codes(False), (weight.scale, weight.zero_point)

    def call(*arguments: Any) -> Tensor:
        moved = [value.to(DEVICE) if isinstance(value, Tensor) else value for value in arguments]
        result: Tensor = native.triton_weight_only_linear(*moved)
        return result

    assert call(torch.zeros(0, 64), held, *grid, None, 8, 0, 40).shape == (0, 40)
    with pytest.raises(BackendError, match="must be contiguous"):
        call(torch.zeros(2, 32), held, *grid, None, 8, 0, 40)
    with pytest.raises(BackendError, match="groups of 24"):
        call(x, held, *grid, None, 8, 24, 40)
    with pytest.raises(BackendError, match="the bias"):
        call(x, held, *grid, torch.zeros(39), 8, 0, 40)
    with pytest.raises(BackendError, match="reads float32"):
        call(x.double(), held, *grid, None, 8, 0, 40)


# --- rows of activations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "centered", "dtype"), covering([1, 16, 75, 1152], [True, False], FLOATS))
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
    moved = [value.to(DEVICE) for value in (x, weight, bias, factor, shift, scale, zero_point)]
    found = native.triton_norm_quantize(moved[0], centered, 1e-6, *moved[1:4], 1.0, *moved[4:], 255, torch.int8).cpu()
    distance = (found.double() + 128 - (y.round() + zero_point).clamp(0, 255)).abs()
    assert (distance[(y - y.floor() - 0.5).abs() > 2e-3] == 0).all()
    assert distance.max() <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("qmax", [255, 63])
def test_codes_are_the_references_bit_for_bit(dtype: torch.dtype, qmax: int) -> None:
    torch.manual_seed(0)
    x = (torch.randn(3, 70, 41) * 4).to(dtype)
    x[0, 0, :4] = torch.tensor([1e30, -1e30, 0.0, -0.0]).to(dtype)
    x[1, 0, :20] = (torch.arange(20) * 0.5 - 5).to(dtype) * 0.03125  # Halves between two codes.
    for shape in ((), (3, 1, 1), (3, 70, 1)):
        scale = torch.full(shape, 0.03125) if shape == () else torch.rand(shape) * 0.1 + 0.01
        zero_point = torch.randint(0, qmax, shape, dtype=torch.uint8)
        found = native.triton_quantize(x.to(DEVICE), scale.to(DEVICE), zero_point.to(DEVICE), qmax, torch.int8).cpu()
        right = grids.quantize(x, scale, zero_point, 0, qmax)
        assert torch.equal(found.to(torch.int16) + 128, right.to(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 6])
@pytest.mark.parametrize("channels", [1, 41, 1152])
def test_grids_of_tokens_are_the_references_bit_for_bit(dtype: torch.dtype, bits: int, channels: int) -> None:
    torch.manual_seed(0)
    x = (torch.randn(3, 7, channels) * torch.logspace(-6, 4, 7).reshape(7, 1)).to(dtype)
    x[0, 0], x[0, 1], x[0, 2] = 0.0, x[0, 1].abs(), -x[0, 2].abs()
    x[0, 3], x[0, 4] = torch.finfo(dtype).tiny, -torch.finfo(dtype).max
    x[0, 4, : channels // 2] *= -1
    codes, scale, zero_point, sums = native.triton_quantize_tokens(x.to(DEVICE), 2**bits - 1, torch.int8)
    right = torch.ops.fxquant.token_grid(x, f"int{bits}")
    assert (scale.dtype, zero_point.dtype, scale.shape) == (torch.float32, torch.uint8, (3, 7, 1))
    assert torch.equal(scale.cpu(), right[0])
    assert torch.equal(zero_point.cpu().float(), right[1])
    expected_codes = grids.quantize(x, right[0], right[1], 0, 2**bits - 1)
    assert torch.equal(codes.cpu().float() + 128, expected_codes)
    assert torch.equal(sums, codes.sum(-1, keepdim=True, dtype=torch.int32))


@pytest.mark.parametrize("centered", [True, False])
def test_grids_of_tokens_behind_norms(centered: bool) -> None:
    torch.manual_seed(0)
    x, factor, shift = torch.randn(2, 5, 75), torch.randn(2, 1, 75), torch.randn(2, 1, 75)
    norm = functional.layer_norm(x.double(), [75]) if centered else functional.rms_norm(x.double(), [75], eps=1e-5)
    y = norm * (factor.double() + 1) + shift.double()
    moved = [value.to(DEVICE) for value in (x, factor, shift)]
    arguments = (moved[0], centered, 1e-5, None, None, moved[1], 1.0, moved[2])
    codes, scale, zero_point, sums = (
        value.cpu() for value in native.triton_norm_quantize_tokens(*arguments, 255, torch.int8)
    )
    grid = torch.ops.fxquant.token_grid(y.float(), "int8")
    torch.testing.assert_close(scale, grid[0], rtol=1e-5, atol=0)
    assert (zero_point.int() - grid[1]).abs().max() <= 1
    real = (codes.double() + 128 - zero_point) * scale.double()
    assert ((real - y).abs() <= scale * (0.5 + 1e-3) + 1e-6).all()
    assert torch.equal(sums, codes.sum(-1, keepdim=True, dtype=torch.int32))


@pytest.mark.parametrize("halves", [False, True])
def test_products_with_the_sums_of_their_codes(halves: bool) -> None:
    torch.manual_seed(0)
    codes, weight = torch.randint(0, 256, (2, 70, 75), dtype=torch.uint8), Weight(301, 75, 4)
    grid = torch.tensor(2e-3), torch.tensor(120, dtype=torch.uint8)
    out_scale, out_zero_point = torch.rand(2, 1, 1) + 0.5, torch.tensor([7, 200], dtype=torch.uint8).reshape(2, 1, 1)
    more = {"activation": "gelu_tanh", "out_scale": out_scale, "out_zero_point": out_zero_point}
    right = linear(codes, *grid, weight, halves, **more)
    for config in candidates("int4" if halves else "int8", 4096):
        with trying(config):
            found, sums = linear(codes, *grid, weight, halves, op=native.triton_linear_sums, **more)
        assert torch.equal(found, right)
        assert torch.equal(sums, right.sum(-1, keepdim=True, dtype=torch.int32))


def test_codes_with_their_sums() -> None:
    torch.manual_seed(0)
    x, norm = torch.randn(2, 5, 75, device=DEVICE), (True, 1e-5, None, None, None, 0.0, None)
    grid = torch.rand(2, 1, 1, device=DEVICE) * 0.02, torch.full((2, 1, 1), 99, dtype=torch.uint8, device=DEVICE)
    for codes, (same, sums) in (
        (native.triton_quantize(x, *grid, 255, torch.int8), native.triton_quantize_sums(x, *grid, 255, torch.int8)),
        (
            native.triton_norm_quantize(x, *norm, *grid, 255, torch.int8),
            native.triton_norm_quantize_sums(x, *norm, *grid, 255, torch.int8),
        ),
    ):
        assert torch.equal(codes, same)
        assert torch.equal(sums, codes.sum(-1, keepdim=True, dtype=torch.int32))


@pytest.mark.parametrize("inner", [1, 75, 5000])
def test_row_sums(inner: int) -> None:
    codes = torch.randint(-128, 128, (2, 3, inner), dtype=torch.int8)
    assert torch.equal(native.triton_row_sums(codes.to(DEVICE)).cpu(), codes.sum(-1, keepdim=True, dtype=torch.int32))


# --- 8-bit floats ---------------------------------------------------------------------------------------------------

NO_FP8 = machine.missing(DEVICE, fp8=True)
fp8 = pytest.mark.skipif(NO_FP8 is not None, reason=f"no products of 8-bit floats: {NO_FP8}")


@fp8
def test_values_in_8_bit_floats() -> None:
    torch.manual_seed(0)
    x, scale = torch.randn(2, 500, 33) * 3, torch.tensor(0.02)
    x[0, 0] = 1e9
    x[1] *= 1e-3  # Some of these are no normal numbers of 8 bits.
    x[0, 1, 0], x[0, 1, 1] = math.nan, -math.inf
    found = native.triton_quantize(x.to(DEVICE), scale.to(DEVICE), None, 255, FP8).cpu()
    right = torch.ops.fxquant.quantize(x, scale, None, "fp8").view(FP8)
    assert found[0, 1, 0].float().isnan() and found[0, 1, 1].float() == -448
    assert torch.equal(found.float().nan_to_num(), right.float().nan_to_num())


@fp8
def test_tokens_find_their_scale_of_8_bit_floats() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 7, 33) * torch.logspace(-8, 8, 7)[:, None]
    x[0, 0] = 0.0
    codes, scale, *_ = native.triton_quantize_tokens(x.to(DEVICE), 255, FP8)
    assert torch.equal(scale.cpu(), torch.ops.fxquant.token_scale(x, "fp8"))
    assert torch.equal(codes.cpu().view(torch.uint8), torch.ops.fxquant.quantize(x, scale.cpu(), None, "fp8"))


@fp8
def test_8_bit_floats_have_no_zero_points() -> None:
    x, scale, zero_point = torch.randn(4, 32, device=DEVICE), torch.tensor(0.02, device=DEVICE), torch.tensor(3)
    with pytest.raises(BackendError, match="with a zero point: 8-bit floats have no zero point"):
        native.triton_quantize(x, scale, zero_point.to(DEVICE), 255, FP8)
    with pytest.raises(BackendError, match="without a zero point: integers need a zero point"):
        native.triton_quantize(x, scale, None, 255, torch.int8)


@fp8
@pytest.mark.parametrize(("tokens", "inner", "out"), SHAPES)
def test_products_of_8_bit_floats(tokens: int, inner: int, out: int) -> None:
    torch.manual_seed(0)
    rows, row_scale = (torch.randn(out, inner) * 100).to(FP8), torch.rand(out, 1) + 0.5
    scale = torch.rand(3, 1, 1) + 0.5
    x = (torch.randn(3, tokens, inner) * 100).to(FP8)
    right = x.double() * scale.double() @ (rows.double() * row_scale.double()).t()
    arguments = (x, scale, None, rows, row_scale, None, None, None, 8, out, "none")
    rest = (None, None, None, None, 255, torch.float32, 0, None, None)
    moved = [value.to(DEVICE) if isinstance(value, Tensor) else value for value in (*arguments, *rest)]
    assert sqnr_db(right, native.triton_linear(*moved).cpu()) > (60.0 if DEVICE.type == "cuda" else 100.0)
