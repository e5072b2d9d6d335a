"""Number formats bit for bit against the conversions of torch and torchao."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fxquant.numerics.activations import round_by_token, round_in_range
from fxquant.numerics.formats import FORMATS, Scales
from fxquant.numerics.packing import pack
from fxquant.numerics.weights import encode_weight

torchao_mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
torchao_kernels = pytest.importorskip("torchao.prototype.mx_formats.kernels")
torchao_nvfp4 = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
torchao_constants = pytest.importorskip("torchao.prototype.mx_formats.constants")

ALL_CODES = torch.arange(256, dtype=torch.uint8)
TORCH = {"fp8": torch.float8_e4m3fn, "fp8e5m2": torch.float8_e5m2, "mxfp8": torch.float8_e4m3fn}
SMALL = {
    "mxfp4": (torchao_kernels.f32_to_f4_unpacked, torchao_kernels.f4_unpacked_to_f32),
    "nvfp4": (torchao_kernels.f32_to_f4_unpacked, torchao_kernels.f4_unpacked_to_f32),
    "mxfp6": (torchao_kernels.f32_to_f6_e2m3_unpacked, torchao_kernels.f6_e2m3_unpacked_to_f32),
    "mxfp6e3m2": (torchao_kernels.f32_to_f6_e3m2_unpacked, torchao_kernels.f6_e3m2_unpacked_to_f32),
}
MX = {
    "mxfp8": torch.float8_e4m3fn,
    "mxfp6": torchao_constants.DTYPE_FP6_E2M3,
    "mxfp6e3m2": torchao_constants.DTYPE_FP6_E3M2,
    "mxfp4": torch.float4_e2m1fn_x2,
}


def numbers() -> Tensor:
    """Every bfloat16 number up to 2**20, and the two float32 neighbours of each: ties and all that surround them."""
    found = torch.arange(0, 1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    found = found[found.isfinite() & (found.abs() < 2.0**20)]
    up, down = torch.tensor(math.inf), torch.tensor(-math.inf)
    return torch.cat([found, torch.nextafter(found, up), torch.nextafter(found, down)])


def same(actual: Tensor, expected: Tensor) -> None:
    """Equal bit for bit, NaN and the sign of 0 included."""
    assert actual.dtype == expected.dtype
    assert torch.equal(actual.isnan(), expected.isnan())
    kept = ~actual.isnan()
    assert torch.equal(actual[kept].view(torch.int32), expected[kept].view(torch.int32))


@pytest.mark.parametrize("name", TORCH)
def test_all_codes_of_8_bits_are_those_of_torch(name: str) -> None:
    same(FORMATS[name].values(), ALL_CODES.view(TORCH[name]).float())


@pytest.mark.parametrize("name", SMALL)
def test_all_codes_of_few_bits_are_those_of_torchao(name: str) -> None:
    codes = ALL_CODES[: 2 ** FORMATS[name].bits]
    same(FORMATS[name].values(), SMALL[name][1](codes))


@pytest.mark.parametrize("name", ["fp8", "fp8e5m2"])
def test_numbers_round_as_in_torch(name: str) -> None:
    x, dtype = numbers(), TORCH[name]
    limit = torch.finfo(dtype).max
    assert torch.equal(
        FORMATS[name].encode(x, Scales(torch.ones(()))), x.clamp(-limit, limit).to(dtype).view(torch.uint8)
    )


@pytest.mark.parametrize("name", SMALL)
def test_numbers_round_as_in_torchao(name: str) -> None:
    x = numbers()
    element = FORMATS[name].element  # type: ignore[attr-defined]
    assert torch.equal(element.encode(x), SMALL[name][0](x))
    assert torch.equal(element.encode(x.double()), SMALL[name][0](x))


def blocks(width: int) -> Tensor:
    """Blocks of all sizes: normal values times powers of two over the whole range of float32, and special ones."""
    torch.manual_seed(0)
    exponents = torch.arange(-115, 120, dtype=torch.float32)
    rows = torch.randn(len(exponents), 4 * width) * exponents.exp2()[:, None]
    special = torch.zeros(4, 4 * width)
    special[1, ::2], special[2, 0] = 3.0, 1e-30
    special[3] = torch.linspace(-7.9, 7.9, 4 * width)
    return torch.cat([rows, special])


@pytest.mark.parametrize("name", MX)
def test_blocks_are_those_of_to_mx(name: str) -> None:
    format, x = FORMATS[name], blocks(32)
    scale, data = torchao_mx.to_mx(x, MX[name], 32)
    grouped = x.unflatten(-1, (-1, 32))
    scales = format.scales(grouped.amin(-1), grouped.amax(-1))
    assert torch.equal(scales.scale, scale.view(torch.uint8))
    each = Scales(scales.scale[..., None])
    codes = format.encode(grouped, each)
    flat = codes.flatten(-2)
    expected = data.view(torch.uint8)
    # A scale of 2**-127 (zeros, and numbers below 2**-126) is not normal in float32; torchao divides by 2**-126.
    normal = (scales.scale > 0).repeat_interleave(32, -1)
    if name == "mxfp4":
        assert torch.equal(pack(flat, 4)[normal[..., ::2]], expected[normal[..., ::2]])
    else:
        assert torch.equal(flat[normal], expected[normal])
    decoded = torchao_mx.to_dtype(data, scale, MX[name], 32, torch.float32)
    assert torch.equal(format.decode(codes, each, torch.float32).flatten(-2)[normal], decoded[normal])


@pytest.mark.parametrize("largest", [1e-20, 0.3, 5.0, 1e12])
def test_blocks_are_those_of_nvfp4_quantize(largest: float) -> None:
    format = FORMATS["nvfp4"]
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * torch.logspace(-5, 0, 64)[:, None] * largest
    x[3] = 0.0
    outer = format.global_scale(x.min(), x.max())
    assert outer is not None
    torch.testing.assert_close(outer, torchao_nvfp4.per_tensor_amax_to_scale(x.abs().max()), rtol=0, atol=0)
    scale, data = torchao_nvfp4.nvfp4_quantize(x, per_tensor_scale=outer)
    grouped = x.unflatten(-1, (-1, 16))
    scales = format.scales(grouped.amin(-1), grouped.amax(-1), global_scale=outer)
    assert torch.equal(scales.scale, scale.view(torch.uint8))
    each = Scales(scales.scale[..., None], None, outer)
    codes = format.encode(grouped, each)
    assert torch.equal(pack(codes.flatten(-2), 4), data)
    held = torchao_nvfp4.NVFP4Tensor(data, scale, 16, torch.float32, per_tensor_scale=outer)
    assert torch.equal(format.decode(codes, each, torch.float32).flatten(-2), held.dequantize(torch.float32))


def weight() -> Tensor:
    """A weight whose rows and blocks differ in size, with a block of zeros."""
    found = torch.randn(48, 192, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 1, 48)[:, None]
    found[:, 64:96] *= 30.0
    found[5, 32:64] = 0.0
    return found


@pytest.mark.parametrize("name", MX)
def test_whole_weights_are_those_of_mx_tensors(name: str) -> None:
    ours = encode_weight(weight(), format=name, group_size=32)
    theirs = torchao_mx.MXTensor.to_mx(weight(), MX[name], 32, is_swizzled_scales=False)
    normal = ours.scale > 0  # As above: the block of zeros has the scale 2**-127.
    assert int((~normal).sum()) == 1
    assert torch.equal(ours.scale, theirs.scale.view(torch.uint8))
    codes = theirs.qdata.view(torch.uint8)
    assert torch.equal(ours.packed if name == "mxfp4" else ours.codes(), codes)
    assert torch.equal(ours.dequantize(torch.float32), theirs.dequantize(torch.float32))


def test_whole_weights_are_those_of_nvfp4_tensors() -> None:
    outer = torchao_nvfp4.per_tensor_amax_to_scale(weight().abs().max())
    ours = encode_weight(weight(), format="nvfp4", group_size=16)
    theirs = torchao_nvfp4.NVFP4Tensor.to_nvfp4(weight(), per_tensor_scale=outer, is_swizzled_scales=False)
    assert torch.equal(ours.global_scale, outer)
    assert torch.equal(ours.scale, theirs.scale.view(torch.uint8))
    assert torch.equal(ours.packed, theirs.qdata)
    assert torch.equal(ours.dequantize(torch.float32), theirs.dequantize(torch.float32))


def test_activations_are_those_of_tensors_of_torchao() -> None:
    tokens = weight().reshape(4, 12, 192)
    for name, dtype in MX.items():
        theirs = torchao_mx.MXTensor.to_mx(tokens, dtype, 32, is_swizzled_scales=False)
        assert torch.equal(round_by_token(tokens, FORMATS[name]), theirs.dequantize(torch.float32))
    low, high = float(tokens.min()), float(tokens.max())
    outer = torchao_nvfp4.per_tensor_amax_to_scale(tokens.abs().max())
    expected = torchao_nvfp4.NVFP4Tensor.to_nvfp4(weight(), per_tensor_scale=outer).dequantize(torch.float32)
    assert torch.equal(round_in_range(tokens, FORMATS["nvfp4"], low, high).flatten(0, 1), expected)


def test_nf4_is_that_of_torchao() -> None:
    module = pytest.importorskip("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    format, x = FORMATS["nf4"], torch.randn(1024, generator=torch.Generator().manual_seed(0))
    theirs = module.NF4Tensor.from_tensor(x, 64, 16)
    # torchao has the values of the paper's table rounded to four digits.
    torch.testing.assert_close(format.values(), theirs.nf4.float(), rtol=0, atol=5.1e-5)
    rows = x.reshape(-1, 64)
    top = rows.abs().amax(-1)
    scales = format.scales(-top, top)
    assert torch.equal(scales.scale, top)
    codes = format.encode(rows, Scales(scales.scale[:, None])).flatten()
    nearest = module.NF4Tensor.quantize_tensor_nearest((rows / top[:, None]).flatten(), format.values())
    assert torch.equal(codes, nearest.to(torch.uint8))
    packed = module.NF4Tensor.convert_to_norm_float_weight(x, 16, 64, format.values())
    assert torch.equal(codes[::2] << 4 | codes[1::2], packed)  # torchao puts the first code in the high half.
