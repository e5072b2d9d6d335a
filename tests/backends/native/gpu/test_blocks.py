"""Products of block formats: their codes against the reference, and what torch's product is given.

No test needs a device of compute capability 10: a double of ``scaled_mm`` decodes its arguments and multiplies them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.nn.functional import ScalingType, SwizzleType

import fxquant
from fxquant.backends.native import Native
from fxquant.backends.native.gpu import blocks, machine
from fxquant.backends.native.gpu import ops as _ops  # noqa: F401  (registers the ops)
from fxquant.errors import BackendError
from fxquant.ir.arguments import args
from fxquant.numerics.formats import FORMATS
from fxquant.numerics.packing import pack
from fxquant.numerics.sqnr import sqnr_db
from fxquant.numerics.weights import encode_weight
from tests.sampling import covering
from tests.support import count
from tests.tiny import calibrate, inputs, make_dit

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MISSING = machine.missing(DEVICE)
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"no Triton kernels: {MISSING}")
native, reference = torch.ops.fxquant_native, torch.ops.fxquant
NAMES = ("mxfp8", "mxfp4", "nvfp4")
E4M3, E8M0, E2M1 = torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2


# --- the double -----------------------------------------------------------------------------------------------------


def decoded(matrix: Tensor, scales: Sequence[Tensor], recipe: Sequence[ScalingType]) -> Tensor:
    """What a matrix of codes `[rows, bytes]` and its swizzled scales stand for, in float64."""
    if matrix.dtype == E2M1:
        codes = matrix.view(torch.uint8)
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
        values = FORMATS["mxfp4"].values().double()[codes.int()]
    else:
        values = matrix.double()
    rows, channels = values.shape
    block = {ScalingType.BlockWise1x32: 32, ScalingType.BlockWise1x16: 16}[recipe[0]]
    columns = -(-channels // block)
    row, column = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    tile = row // 128 * -(-columns // 4) + column // 4
    each = scales[0].double()[tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4]
    outer = scales[1].double() if len(scales) > 1 else 1.0
    return values * each.repeat_interleave(block, 1)[:, :channels] * outer


def scaled_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    scale_a: Sequence[Tensor],
    scale_recipe_a: Sequence[ScalingType],
    scale_b: Sequence[Tensor],
    scale_recipe_b: Sequence[ScalingType],
    swizzle_a: Sequence[SwizzleType],
    swizzle_b: Sequence[SwizzleType],
    bias: Tensor | None = None,
    output_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """What torch documents and checks for CUDA, computed in float64."""
    assert bias is None
    assert mat_a.is_contiguous() and mat_b.t().is_contiguous()
    assert mat_a.dtype == mat_b.dtype and mat_a.dtype in (E4M3, E2M1)
    assert mat_a.shape[1] % 16 == 0 and mat_b.shape[1] % 16 == 0
    channels = mat_a.shape[1] * (2 if mat_a.dtype == E2M1 else 1)
    assert scale_recipe_a == scale_recipe_b and len(scale_a) == len(scale_b) == len(scale_recipe_a)
    mx = scale_recipe_a[0] == ScalingType.BlockWise1x32
    block = 32 if mx else 16
    assert mx or mat_a.dtype == E2M1
    for scales, swizzle, rows in ((scale_a, swizzle_a, mat_a.shape[0]), (scale_b, swizzle_b, mat_b.shape[1])):
        assert swizzle[0] == SwizzleType.SWIZZLE_32_4_4 and len(swizzle) == len(scales)
        assert scales[0].dtype == (E8M0 if mx else E4M3) and scales[0].is_contiguous()
        assert scales[0].numel() == -(-rows // 128) * 128 * -(-channels // (block * 4)) * 4
        if len(scales) == 2:
            assert not mx and scale_recipe_a[1] == ScalingType.TensorWise
            assert scales[1].numel() == 1 and scales[1].dtype == torch.float32
    assert output_dtype == torch.bfloat16 or not (mx and mat_a.dtype == E2M1)
    product = decoded(mat_a, scale_a, scale_recipe_a) @ decoded(mat_b.t(), scale_b, scale_recipe_b).t()
    return product.to(output_dtype)


@pytest.fixture
def newest(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device that multiplies all block formats."""
    monkeypatch.setattr(machine, "missing_blocks", lambda device, format: None)
    monkeypatch.setattr(functional, "scaled_mm", scaled_mm)


# --- layouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (32, 4), (128, 4), (129, 5), (300, 37)])
def test_scales_are_laid_out_as_those_of_torchao(rows: int, columns: int) -> None:
    utils = pytest.importorskip("torchao.prototype.mx_formats.utils")
    scales = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
    found = blocks.swizzled(scales)
    assert torch.equal(found, utils.to_blocked(scales))
    assert torch.equal(blocks.unswizzled(found, rows, columns), scales)


@pytest.mark.parametrize("format", NAMES)
def test_activations_and_weights_are_those_of_torchao(format: str) -> None:
    x = torch.randn(130, 192) * torch.logspace(-4, 2, 192)
    made = encode_weight(x, format=format, group_size=FORMATS[format].block)
    if format == "nvfp4":
        tensor = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor").NVFP4Tensor
        right = tensor.to_nvfp4(x, per_tensor_scale=made.global_scale, is_swizzled_scales=True)
    else:
        tensor = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor").MXTensor
        right = tensor.to_mx(x, E4M3 if format == "mxfp8" else E2M1, 32, is_swizzled_scales=True)
    codes, scales = native.triton_quantize_blocks(x.to(DEVICE), format, move(made.global_scale))
    held = blocks.held_weight(made.packed, 192, format), blocks.swizzled(made.scale)
    for matrix, layout in ((codes.cpu(), scales.cpu()), held):
        assert torch.equal(matrix[:130].view(torch.uint8), right.qdata.view(torch.uint8))
        assert torch.equal(layout, right.scale.view(torch.uint8).flatten())


@pytest.mark.parametrize("format", NAMES)
@pytest.mark.parametrize(("out", "inner"), [(16, 64), (24, 96), (5, 32), (130, 160)])
def test_weights_lead_back(format: str, out: int, inner: int) -> None:
    size = inner * FORMATS[format].bits // 8
    packed = torch.randint(0, 256, (out, size), dtype=torch.uint8)
    held = blocks.held_weight(packed, inner, format)
    assert held.shape == (-(-out // 16) * 16, -(-size // 16) * 16)
    assert torch.equal(blocks.unheld_weight(held, out, inner, format), packed)


# --- codes ----------------------------------------------------------------------------------------------------------


def move(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.to(DEVICE)


def outer_of(format: str, shape: Sequence[int]) -> Tensor | None:
    return torch.rand(shape) * 0.004 + 0.001 if format == "nvfp4" else None


def check_codes(x: Tensor, format: str, outer: Tensor | None) -> None:
    """Codes and scales are those of the reference; what is a code beside the scale NaN does not matter."""
    scale = reference.block_scale(x, format, outer)
    right = pack(reference.quantize(x, scale, None, format, outer), FORMATS[format].bits)
    found, held = (part.cpu() for part in native.triton_quantize_blocks(x.to(DEVICE), format, move(outer)))
    unknown = FORMATS[format].scale_values(scale).isnan()
    rows = blocks.unswizzled(held, scale.shape[:-1].numel(), scale.shape[-1]).reshape(scale.shape)
    assert torch.equal(FORMATS[format].scale_values(rows).isnan(), unknown)
    assert torch.equal(rows[~unknown], scale[~unknown])
    assert torch.equal(blocks.swizzled(rows.flatten(0, -2)), held)
    found = found.view(torch.uint8)
    assert found[..., right.shape[-1] :].eq(0).all()
    same = (found[..., : right.shape[-1]] == right).unflatten(-1, (scale.shape[-1], -1)).all(-1)
    assert (same | unknown).all()


@pytest.mark.parametrize(
    ("format", "shape", "grid", "dtype"),
    covering(
        NAMES,
        [((3, 5, 96),), ((130, 288),), ((2, 3, 32),)],
        ["one", "sample", "row"],
        [torch.float32, torch.bfloat16, torch.float16],
    ),
)
def test_codes_are_the_references_bit_for_bit(
    format: str, shape: tuple[int, ...], grid: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x = (torch.randn(shape) * torch.logspace(-4, 3, shape[-1])).to(dtype)
    leading = {"one": (), "sample": (shape[0], *[1] * (len(shape) - 1)), "row": (*shape[:-1], 1)}[grid]
    check_codes(x, format, outer_of(format, leading))


@pytest.mark.parametrize("format", NAMES)
def test_codes_at_ties_and_limits(format: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(12, 64)
    x[0] = 0.0
    x[1] = -0.0
    x[2, 3], x[2, 40] = math.inf, -math.inf
    x[3, 5] = math.nan
    x[4] *= 1e-40  # Below the normal numbers of float32.
    x[5] *= 1e38
    x[6, :32] = torch.arange(-16, 16) * 0.25  # Halves between two codes.
    x[7, :32] = torch.arange(-16, 16) * 2.0**-9 * 1.5
    x[7, 0] = 448.0
    x[8, 0], x[8, 32] = 2.0**127, 2.0**-126
    check_codes(x, format, outer_of(format, ()))
    if format == "nvfp4":
        check_codes(x[:, :48].contiguous(), format, torch.tensor(1.0))  # 24 bytes per row are filled up to 32.


@pytest.mark.parametrize("format", NAMES)
@pytest.mark.parametrize(("channels", "block"), [(96, 16), (192, 64), (512, 512)])
def test_codes_of_rotated_values(format: str, channels: int, block: int) -> None:
    torch.manual_seed(0)
    x, outer = torch.randn(3, 5, channels).to(DEVICE), move(outer_of(format, ()))
    signs = torch.randint(0, 2, (channels,), dtype=torch.int8, device=DEVICE) * 2 - 1
    right = native.triton_quantize_blocks(native.triton_hadamard(x, signs, block), format, outer)
    for found, part in zip(native.triton_quantize_blocks(x, format, outer, signs, block), right, strict=True):
        assert torch.equal(found.view(torch.uint8), part.view(torch.uint8))


def test_values_that_have_no_blocks_are_refused() -> None:
    with pytest.raises(BackendError, match="blocks of 32 channels, which do not divide 48"):
        native.triton_quantize_blocks(torch.zeros(2, 48, device=DEVICE), "mxfp8")
    with pytest.raises(BackendError, match="reads float32"):
        native.triton_quantize_blocks(torch.zeros(2, 64, device=DEVICE, dtype=torch.float64), "mxfp8")
    codes, scales = native.triton_quantize_blocks(torch.zeros(0, 7, 64, device=DEVICE), "mxfp4")
    assert codes.shape == (0, 7, 32) and scales.shape == (0,)


# --- products -------------------------------------------------------------------------------------------------------


def operands(format: str, out: int, inner: int, outer: Tensor | None) -> tuple[Any, ...]:
    """The codes and scales of the reference: of a weight, then of activations `[3, 5, in]`."""
    torch.manual_seed(0)
    made = encode_weight(torch.randn(out, inner), format=format, group_size=FORMATS[format].block)
    x = torch.randn(3, 5, inner)
    scale = reference.block_scale(x, format, outer)
    return made.packed, made.scales, x, scale, reference.quantize(x, scale, None, format, outer)


@pytest.mark.usefixtures("newest")
@pytest.mark.parametrize(
    ("format", "shape", "grid", "dtype", "bias"),
    covering(
        NAMES,
        [((32, 64),), ((24, 96),), ((5, 160),)],
        ["one", "sample", "row"],
        [torch.float32, torch.bfloat16, torch.float16],
        [None, "vector", "samples"],
    ),
)
def test_products_are_those_of_the_reference(
    format: str, shape: tuple[int, int], grid: str, dtype: torch.dtype, bias: str | None
) -> None:
    out, inner = shape
    outer = outer_of(format, {"one": (), "sample": (3, 1, 1), "row": (3, 5, 1)}[grid])
    packed, weight, x, scale, codes = operands(format, out, inner, outer)
    added = {None: None, "vector": torch.randn(out), "samples": torch.randn(3, 1, out)}[bias]
    group = FORMATS[format].block
    grid_of_weight = (packed, weight.scale, None)
    right = reference.linear(
        codes, scale, None, *grid_of_weight, added, format, format, group, torch.float64, outer, weight.global_scale
    )
    held, scales = native.triton_quantize_blocks(x, format, outer)
    arguments = (blocks.held_weight(packed, inner, format), blocks.swizzled(weight.scale), weight.global_scale)
    found = native.scaled_linear(held, scales, outer, *arguments, added, format, inner, out, dtype)
    assert found.dtype == dtype and found.shape == right.shape
    floor = {torch.float32: 120.0, torch.bfloat16: 44.0, torch.float16: 60.0}[dtype]
    assert sqnr_db(right, found) > (44.0 if format == "mxfp4" else floor)


@pytest.mark.usefixtures("newest")
def test_products_that_do_not_fit_are_refused() -> None:
    packed, weight, x, *_ = operands("mxfp8", 16, 64, None)
    held, scales = native.triton_quantize_blocks(x, "mxfp8")
    rest = (blocks.held_weight(packed, 64, "mxfp8"), blocks.swizzled(weight.scale), None, None, "mxfp8")
    with pytest.raises(BackendError, match=r"the codes of 96 inputs and 16 outputs in mxfp8 are \[96\], not \[64\]"):
        native.scaled_linear(held, scales, None, *rest, 96, 16, torch.float32)
    with pytest.raises(BackendError, match=r"the weight of 64 inputs and 40 outputs in mxfp8 are \[48, 64\]"):
        native.scaled_linear(held, scales, None, *rest, 64, 40, torch.float32)
    with pytest.raises(BackendError, match="the scales of 64 inputs"):
        native.scaled_linear(held, scales[:-1], None, *rest, 64, 16, torch.float32)


class NotSwizzled:
    """Names of layouts that are wrong."""

    SWIZZLE_32_4_4 = NO_SWIZZLE = SwizzleType.NO_SWIZZLE


@pytest.mark.parametrize("format", NAMES)
@pytest.mark.parametrize("grid", [(), (3, 5, 1)])
def test_torch_accepts_the_arguments(format: str, grid: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The function that tells torch.compile of the result checks arguments as the device does."""
    monkeypatch.setattr(machine, "missing_blocks", lambda device, format: None)
    monkeypatch.setattr(machine, "check_tensors", lambda *arguments: None)
    out, inner = 24, 96
    rows, bits = 3 * 5, FORMATS[format].bits
    with FakeTensorMode():
        dtype = E4M3 if bits == 8 else torch.uint8
        held = blocks.held_bytes(inner, format)
        codes, weight = (torch.empty(*size, held, dtype=dtype, device="cuda") for size in ((3, 5), (32,)))
        scales, w_scales = (
            torch.empty(blocks.scale_bytes(count, inner, format), dtype=torch.uint8, device="cuda")
            for count in (rows, out)
        )
        outer, w_outer = (torch.empty(shape, device="cuda") if format == "nvfp4" else None for shape in (grid, ()))
        bias = torch.empty(out, device="cuda")
        arguments = (codes, scales, outer, weight, w_scales, w_outer, bias, format, inner, out, torch.bfloat16)
        found = blocks.scaled_linear(*arguments)
        assert (found.shape, found.dtype, found.device.type) == ((3, 5, out), torch.bfloat16, "cuda")
        monkeypatch.setattr(blocks, "SwizzleType", NotSwizzled)
        with pytest.raises(RuntimeError, match=r"(?i)swizzle type"):
            blocks.scaled_linear(*arguments)


# --- graphs ---------------------------------------------------------------------------------------------------------


def compiled(recipe: str, backend: Any) -> fxquant.GraphModel:
    # Few tokens, because the interpreter is slow.
    model = make_dit(sample_size=4, attention_head_dim=32, num_attention_heads=1)
    return fxquant.compile(model, recipe=recipe, backend=backend, calibrate=calibrate(model, size=4), measure=0)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.usefixtures("newest")
@pytest.mark.skipif(DEVICE.type == "cuda", reason="models are on the CPU, where there is no interpreter")
@pytest.mark.parametrize(
    "recipe",
    [
        "rtn-dynamic-wnvfp4anvfp4",
        pytest.param("rtn-wmxfp4amxfp4", marks=pytest.mark.exhaustive),
        pytest.param("htg-wnvfp4anvfp4", marks=pytest.mark.exhaustive),
        pytest.param("rtn-wmxfp8amxfp8", marks=pytest.mark.exhaustive),
    ],
)
def test_models(recipe: str, tmp_path: Path) -> None:
    oracle = compiled(recipe, "fake-quant")
    fxquant.save(oracle, tmp_path / "oracle")
    ours = fxquant.load(tmp_path / "oracle", backend=Native("triton"))
    call = inputs(3, timestep=None, size=4)
    found = ours(**call).sample
    assert sqnr_db(oracle(**call).sample, found) > (25.0 if "mxfp4" in recipe else 40.0)
    module = ours.captured[0].module
    assert count(module, native.scaled_linear.default) > 4
    assert count(module, reference.quantize.default) == count(module, reference.block_scale.default) == 0
    assert any(layer.kernel.startswith("torch scaled_mm") for layer in fxquant.report(ours).layers)
    fxquant.save(ours, tmp_path / "ours")
    again = fxquant.load(tmp_path / "ours", backend="fake-quant")
    assert torch.equal(again(**call).sample, oracle(**call).sample)
    traced = torch.compile(ours, backend="aot_eager", fullgraph=True)
    assert sqnr_db(found, traced(**call).sample) > 100.0


@torch.no_grad()
@pytest.mark.usefixtures("newest")
@pytest.mark.skipif(DEVICE.type == "cuda", reason="models are on the CPU, where there is no interpreter")
def test_rotations_are_in_the_kernel_that_makes_codes(tmp_path: Path) -> None:
    oracle = compiled("quarot-wmxfp4amxfp4", "fake-quant")
    fxquant.save(oracle, tmp_path / "oracle")
    ours = fxquant.load(tmp_path / "oracle", backend=Native("triton"))
    module = ours.captured[0].module
    makers = [node for node in module.graph.nodes if node.target is native.triton_quantize_blocks.default]
    assert any(args(node).signs for node in makers)
    assert count(module, native.triton_hadamard.default) == count(module, reference.hadamard.default) == 0
    call = inputs(3, timestep=None, size=4)
    assert sqnr_db(oracle(**call).sample, ours(**call).sample) > 25.0


@pytest.mark.usefixtures("newest")
def test_formats_that_no_product_takes_together_are_refused() -> None:
    with pytest.raises(BackendError, match="mxfp4 are mxfp4 by mxfp4, not mxfp8 by mxfp4; choose wmxfp4amxfp4"):
        compiled("rtn-wmxfp4amxfp8", Native("triton"))


def test_devices_without_the_products_refuse_them() -> None:
    with pytest.raises(BackendError, match=r"format mxfp8, and the products of this backend take fp8, int2, .*int8"):
        compiled("rtn-wmxfp8amxfp8", Native("triton"))
    x, scales = torch.zeros(2, 64, dtype=E4M3), torch.zeros(512, dtype=torch.uint8)
    with pytest.raises(BackendError, match="torch multiplies mxfp8 on NVIDIA GPUs only, not on cpu"):
        native.scaled_linear(x, scales, None, x, scales, None, None, "mxfp8", 64, 2, torch.float32)


@pytest.mark.parametrize(
    ("capability", "formats"),
    [
        ((8, 9), set()),
        ((9, 0), set()),
        ((10, 0), {"mxfp8", "mxfp4", "nvfp4"}),
        ((10, 3), {"mxfp8", "mxfp4", "nvfp4"}),
        ((12, 0), {"mxfp8", "nvfp4"}),
    ],
)
def test_formats_by_device(capability: tuple[int, int], formats: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    machine._missing_on_gpu.cache_clear()
    gpu = torch.device("cuda", 0)
    backend = Native().on(gpu)
    assert backend.product_formats() - Native("triton").product_formats() == formats
    assert all(name in backend.describe(gpu) for name in formats)
    reason = machine.missing_blocks(gpu, "mxfp4")
    assert (reason is None) == ("mxfp4" in formats)
    assert reason is None or f"compute capability {capability[0]}.{capability[1]}, and products of mxfp4" in reason
    machine._missing_on_gpu.cache_clear()
