"""Rotations of channels on GPUs: the transform, its codes, and graphs that hold them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxquant
from fxquant.backends.native import Native
from fxquant.backends.native.gpu import machine
from fxquant.backends.native.gpu import ops as _ops  # noqa: F401  (registers the ops)
from fxquant.backends.native.gpu.rotations import MOST_CHANNELS
from fxquant.errors import BackendError
from fxquant.ir.arguments import args
from fxquant.ir.stages import verify
from fxquant.numerics.hadamard import rotate
from fxquant.numerics.sqnr import sqnr_db
from fxquant.planning.plan import Plan
from tests.sampling import covering
from tests.support import captured, count, golden, outputs, text
from tests.tiny import calibrate, make_dit, run

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MISSING = machine.missing(DEVICE)
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"no Triton kernels: {MISSING}")
native, reference = torch.ops.fxquant_native, torch.ops.fxquant
FP8 = torch.float8_e4m3fn
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

SHAPES = [(8, 1), (6, 2), (12, 4), (72, 8), (96, 32), (192, 64), (1152, 128), (768, 256), (512, 512), (2048, 2048)]


def random_signs(channels: int) -> Tensor:
    return torch.randint(0, 2, (channels,), dtype=torch.int8, device=DEVICE) * 2 - 1


def values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(shape).to(DEVICE, dtype)


@pytest.mark.parametrize(("channels", "block"), SHAPES)
def test_the_transform_is_the_product(channels: int, block: int) -> None:
    for dtype, floor in ((torch.float32, 130.0), (torch.bfloat16, 46.0), (torch.float16, 65.0)):
        x, signs = values(3, 5, channels, dtype=dtype), random_signs(channels)
        found = native.triton_hadamard(x, signs, block)
        assert found.dtype == dtype
        assert sqnr_db(rotate(x.double(), signs, block), found) > floor
        assert sqnr_db(reference.hadamard(x, signs, block), found) > floor
    assert native.triton_hadamard(x[:0], signs, block).shape == (0, 5, channels)
    turned = x.transpose(0, 1)
    right = native.triton_hadamard(turned.contiguous(), signs, block)
    assert torch.equal(native.triton_hadamard(turned, signs, block), right)


def test_extreme_values_stay_in_their_block() -> None:
    x, signs = values(2, 64), random_signs(64)
    for value in (float("nan"), float("inf"), torch.finfo(torch.float32).max):
        x[0, 3] = value
        found, right = native.triton_hadamard(x, signs, 16), rotate(x, signs, 16)
        assert torch.equal(found.isfinite(), right.isfinite())
        torch.testing.assert_close(found[:, 16:], right[:, 16:])


@pytest.mark.parametrize(
    ("channels", "block", "grid", "dtype", "codes"),
    covering([72, 1152, 256], [1, 8], ["one", "sample", "row"], FLOATS, [torch.int8, FP8]),
)
def test_codes_are_those_of_the_rotated_values(
    channels: int, block: int, grid: str, dtype: torch.dtype, codes: torch.dtype
) -> None:
    """One kernel gives the codes, sums and grids of two, bit for bit."""
    x, signs = values(3, 5, channels, dtype=dtype), random_signs(channels)
    shape = {"one": (), "sample": (3, 1, 1), "row": (3, 5, 1)}[grid]
    scale = torch.rand(shape).to(DEVICE) * 0.02 + 0.01
    zero_point = None if codes == FP8 else torch.randint(0, 250, shape, dtype=torch.uint8).to(DEVICE)
    rotated, rest = native.triton_hadamard(x, signs, block), (scale, zero_point, 250, codes)
    right = native.triton_quantize(rotated, *rest)
    assert right.dtype == codes
    assert torch.equal(native.triton_quantize(x, *rest, signs, block).float(), right.float())
    if codes != FP8:
        found, sums = native.triton_quantize_sums(x, *rest, signs, block)
        assert torch.equal(found, right)
        assert torch.equal(sums, right.sum(-1, keepdim=True, dtype=torch.int32))
    found_all = native.triton_quantize_tokens(x, 250, codes, signs, block)
    for found, part in zip(found_all, native.triton_quantize_tokens(rotated, 250, codes), strict=True):
        assert torch.equal(found.float(), part.float())


@pytest.mark.parametrize("centered", [True, False])
def test_rotations_behind_norms(centered: bool) -> None:
    x, signs, factor, shift = values(2, 5, 72), random_signs(72), values(2, 1, 72), values(2, 1, 72) + 1
    norm = functional.layer_norm(x, [72]) if centered else functional.rms_norm(x, [72], eps=1e-5)
    y = rotate((norm * (factor + 1) + shift).double(), signs, 8)
    before = (x, centered, 1e-5, None, None, factor, 1.0, shift)
    scale, zero_point = torch.full((2, 1, 1), 0.05), torch.tensor([100, 140], dtype=torch.uint8).reshape(2, 1, 1)
    grid = scale.to(DEVICE), zero_point.to(DEVICE)
    codes = native.triton_norm_quantize(*before, *grid, 255, torch.int8, signs, 8)
    steps = y / 0.05
    distance = (codes.double() + 128 - (steps.round() + grid[1]).clamp(0, 255)).abs()
    assert (distance[(steps - steps.floor() - 0.5).abs() > 1e-3] == 0).all()
    assert distance.max() <= 1
    same, sums = native.triton_norm_quantize_sums(*before, *grid, 255, torch.int8, signs, 8)
    assert torch.equal(same, codes)
    assert torch.equal(sums, codes.sum(-1, keepdim=True, dtype=torch.int32))
    codes, scale, zero_point, _ = native.triton_norm_quantize_tokens(*before, 255, torch.int8, signs, 8)
    assert ((codes.double() + 128 - zero_point) * scale - y).abs().le(scale * 0.501 + 1e-6).all()


@pytest.mark.parametrize(
    ("signs", "block", "message"),
    [
        (torch.ones(8, dtype=torch.int8), 4, "signs are int8"),
        (torch.ones(12), 4, "signs are int8"),
        (torch.ones(12, dtype=torch.int8), 3, "blocks of 3 channels"),
        (torch.ones(12, dtype=torch.int8), 8, "blocks of 8 channels"),
        (torch.ones(12, dtype=torch.int8), 0, "blocks of 0 channels"),
    ],
)
def test_what_does_not_fit_is_refused(signs: Tensor, block: int, message: str) -> None:
    x = values(2, 12)
    for call in (
        lambda: native.triton_hadamard(x, signs.to(DEVICE), block),
        lambda: native.triton_quantize_tokens(x, 255, torch.int8, signs.to(DEVICE), block),
    ):
        with pytest.raises(BackendError, match=message):
            call()
    with pytest.raises(BackendError, match="reads float32"):
        native.triton_hadamard(x.double(), torch.ones(12, dtype=torch.int8, device=DEVICE), 4)
    many = 2 * MOST_CHANNELS
    with pytest.raises(BackendError, match=f"up to {MOST_CHANNELS}"):
        native.triton_hadamard(values(1, many), random_signs(many), many)


# --- graphs ---------------------------------------------------------------------------------------------------------


class Rotated(nn.Module):
    """A modulated norm and a quantized linear with a rotated input, which may be returned as well."""

    def __init__(self, tokens: bool, shared: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.shared = tokens, shared
        self.register_buffer("packed", torch.randint(0, 256, (24, 32), dtype=torch.uint8))
        self.register_buffer("step", torch.full((24, 1), 0.01))
        self.register_buffer("zero", torch.full((24, 1), 128, dtype=torch.uint8))
        self.register_buffer("scale", torch.tensor(0.03))
        self.register_buffer("middle", torch.tensor(120, dtype=torch.uint8))
        self.register_buffer("signs", torch.randint(0, 2, (32,), dtype=torch.int8) * 2 - 1)

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        y = functional.layer_norm(x, [32], eps=1e-6) * (1 + c[:, None]) + c[:, None]
        y = reference.hadamard(y, self.signs, 16)
        found = reference.token_grid(y, "int8")
        scale, middle = (found[0], found[1]) if self.tokens else (self.scale, self.middle)
        codes = reference.quantize(y, scale, middle, "int8")
        grid = (self.packed, self.step, self.zero)
        out = reference.linear(codes, scale, middle, *grid, None, "int8", "int8", 0, torch.float32)
        return (out, y) if self.shared else (out,)


def lowered(model: nn.Module) -> torch.fx.GraphModule:
    """Checked against the quantized graph."""
    example = torch.randn(2, 5, 32), torch.randn(2, 32)
    module = captured(model, *example).module
    expected = outputs(module, *example)
    Native("triton").finish(module, Plan("", "", None))
    verify(module, Native.spec)
    for right, found in zip(expected, outputs(module, *example), strict=True):
        assert sqnr_db(right, found) > 60.0  # A code at a tie moves by one.
    return module


needs_interpreter = pytest.mark.skipif(
    machine.missing(torch.device("cpu")) is not None, reason="graphs are on the CPU, where there is no interpreter"
)


@needs_interpreter
def test_norm_modulation_rotation_and_codes_are_one_kernel() -> None:
    assert text(lowered(Rotated(tokens=False))) == golden("""
        x: float32[B, 5, 32]
        c: float32[B, 32]
        slice_1: float32[B, 32] = slice.Tensor(c, 0, 0, 9223372036854775807)
        unsqueeze: float32[B, 1, 32] = unsqueeze(slice_1, 1)
        triton_norm_quantize_default: int8[B, 5, 32] = fxquant_native::triton_norm_quantize(x, True, 1e-06, None, None, unsqueeze, 1.0, unsqueeze, @scale, @middle, 255, int8, @signs, 16)
        triton_linear_default: float32[B, 5, 24] = fxquant_native::triton_linear(triton_norm_quantize_default, @scale, @middle, @packed_rows, @step, @zero, @packed_sums, None, 8, 24, none, None, None, None, None, 255, float32, 0, None, None)
        return triton_linear_default
        """)  # noqa: E501
    module = lowered(Rotated(tokens=True))
    assert count(module, native.triton_norm_quantize_tokens.default) == 1
    assert count(module, reference.hadamard.default) == count(module, native.triton_hadamard.default) == 0


@needs_interpreter
@pytest.mark.parametrize("tokens", [True, False])
def test_a_rotation_that_others_read_is_a_kernel_of_its_own(tokens: bool) -> None:
    module = lowered(Rotated(tokens, shared=True))
    assert count(module, native.triton_hadamard.default) == 1
    assert count(module, reference.hadamard.default) == 0


@needs_interpreter
@pytest.mark.parametrize("recipe", ["quarot-w4a4", pytest.param("quarot-dynamic-w4a8", marks=pytest.mark.exhaustive)])
def test_models_with_rotations(recipe: str, tmp_path: Path) -> None:
    model, options = make_dit(sample_size=4), {"size": 4}  # Few tokens, because the interpreter is slow.
    calibration: Any = calibrate(model, **options)
    right = fxquant.compile(model, recipe=recipe, calibrate=calibration, measure=0)
    fxquant.save(right, tmp_path / "right")
    found = fxquant.load(tmp_path / "right", backend="native{kernels=triton}")
    module = found.captured[0].module
    assert count(module, native.triton_hadamard.default) == 0
    assert count(module, reference.hadamard.default) == 0
    op = native.triton_norm_quantize_tokens if "dynamic" in recipe else native.triton_norm_quantize
    assert any(args(node).signs for node in module.graph.nodes if node.target is op.default)
    assert sqnr_db(run(right, **options), run(found, **options)) > 40.0
