"""Products against sums in int64, and against the reference ops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxquant.backends.torchao import ops as _ops  # noqa: F401  (registers the ops)
from fxquant.backends.torchao import weights
from fxquant.numerics.sqnr import sqnr_db
from fxquant.numerics.weights import QuantizedWeight, quantize_weight

ours, reference = torch.ops.fxquant_torchao, torch.ops.fxquant
F32 = torch.float32


def made_weight(out: int, width: int, bits: int = 8, symmetric: bool = True, group_size: int = 0) -> QuantizedWeight:
    torch.manual_seed(out + width)
    return quantize_weight(torch.randn(out, width) + 0.2, bits=bits, symmetric=symmetric, group_size=group_size)


def held(made: QuantizedWeight) -> tuple[Tensor, Tensor | None]:
    """The int8 weight, and its excess."""
    weight = weights.signed(made.packed, made.zero_point, made.bits, made.in_features)
    return weight, weights.excess(made.scale, made.zero_point, made.bits)


def close(actual: Tensor, expected: Tensor, ratio: float = 2e-6) -> None:
    assert actual.shape == expected.shape
    assert float((actual.double() - expected).abs().max()) <= ratio * float(expected.abs().max())


@pytest.mark.parametrize("width", [1, 8, 37, 1152])
@pytest.mark.parametrize(("out", "rows"), [(1, 1), (19, 3), (64, 40)])
@pytest.mark.parametrize("values", ["extreme", "random"])
def test_integer_sums_are_those_of_int64(width: int, out: int, rows: int, values: str) -> None:
    generator = torch.Generator().manual_seed(width)
    codes = torch.randint(0, 256, (rows, width), dtype=torch.uint8, generator=generator)
    weight = torch.randint(-128, 128, (out, width), dtype=torch.int8, generator=generator)
    if values == "extreme":
        codes[:], weight[:] = 255, 127
        codes[1::2], weight[1::2] = 0, -128
    zero = torch.tensor(0, dtype=torch.uint8)
    sums = weight.sum(1, dtype=torch.int32)
    y = ours.linear_rows(codes, torch.tensor(1.0), zero, weight, torch.ones(out, 1), sums, None, None, F32)
    exact = codes.long() @ weight.long().t()
    assert torch.equal(y, exact.float())  # The integer, rounded to float32 once.


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("grid", ["one", "sample", "token"])
def test_rows_of_every_grid(bits: int, symmetric: bool, grid: str) -> None:
    made = made_weight(24, 40, bits, symmetric)
    shape = {"one": (), "sample": (2, 1, 1), "token": (2, 5, 1)}[grid]
    codes = torch.randint(0, 256, (2, 5, 40), dtype=torch.uint8)
    scale, zero_point = torch.rand(shape) + 0.1, torch.randint(0, 256, shape, dtype=torch.uint8)
    bias = torch.randn(2, 1, 24) if grid == "sample" else torch.randn(24)
    weight, excess = held(made)
    assert (excess is None) == (symmetric or bits < 8)
    sums = weight.sum(1, dtype=torch.int32)
    y = ours.linear_rows(codes, scale, zero_point, weight, made.scale, sums, excess, bias, F32)
    grids = codes, scale, zero_point, made.packed, made.scale, made.zero_point
    close(y, reference.linear(*grids, bias, "int8", f"int{bits}", 0, torch.float64))


@pytest.mark.parametrize(
    ("groups", "stride", "padding", "dilation"), [(1, 2, 0, 1), (1, 1, 2, 2), (2, 1, 1, 1), (4, 3, 1, 1)]
)
def test_window_sums_are_convolutions_with_ones(groups: int, stride: int, padding: int, dilation: int) -> None:
    codes = torch.randint(0, 256, (3, 4, 9, 7), dtype=torch.uint8)
    kernel, geometry = [4 // groups, 3, 2], ([stride] * 2, [padding] * 2, [dilation] * 2, groups)
    found = ours.window_sums(codes, 0.25, 100, kernel, *geometry, 8)
    ones = torch.ones(8, *kernel, dtype=torch.float64)
    expected = torch.nn.functional.conv2d((codes.double() - 100) * 0.25, ones, None, *geometry)
    assert torch.equal(found.expand(expected.shape).double(), expected)


@pytest.mark.parametrize("bits", [2, 5, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("dtype", "floor"), [(torch.float32, 120.0), (torch.bfloat16, 40.0), (torch.float16, 60.0)])
def test_weights_of_bytes(bits: int, symmetric: bool, dtype: torch.dtype, floor: float) -> None:
    made = made_weight(24, 40, bits, symmetric)
    weight, excess = held(made)
    x, bias = torch.randn(2, 5, 40).to(dtype), torch.randn(24).to(dtype)
    y = ours.linear_of_bytes(x, weight, made.scale, excess, bias)
    assert y.dtype == dtype
    expected = torch.nn.functional.linear(x.double(), made.dequantize(torch.float64), bias.double())
    assert sqnr_db(expected, y.double()) > floor


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("width", "group_size"), [(64, 32), (96, 0), (192, 96), (512, 512), (256, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_nibbles(bits: int, width: int, group_size: int, dtype: torch.dtype) -> None:
    made = made_weight(48, width, bits, False, group_size)
    group = weights.group_of_four_bits(48, width, group_size, "cpu")
    assert group is not None
    weight = weights.four_bits(made.packed, bits, width)
    assert weight.numel() == 48 * width // 2
    assert torch.equal(weights.from_four_bits(weight, 48, width, bits), made.packed)
    x, bias = torch.randn(2, 5, width).to(dtype), torch.randn(48).to(dtype)
    y = ours.linear_of_nibbles(x, weight, made.scale, made.zero_point, bits, group, bias)
    expected = torch.nn.functional.linear(x.double(), made.dequantize(torch.float64), bias.double())
    assert sqnr_db(expected, y.double()) > (38.0 if dtype == torch.bfloat16 else 60.0)


@pytest.mark.parametrize(
    ("shape", "group_size", "group"),
    [((64, 96), 0, 32), ((64, 96), 96, 32), ((64, 512), 0, 256), ((64, 48), 16, None), ((40, 64), 32, None)],
)
def test_groups_of_the_kernel(shape: tuple[int, int], group_size: int, group: int | None) -> None:
    assert weights.group_of_four_bits(*shape, group_size, "cpu") == group


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_code_is_found_again(bits: int, symmetric: bool) -> None:
    made = made_weight(7, 36, bits, symmetric)
    weight, excess = held(made)
    for value in (weight, weight.unflatten(1, (4, 3, 3))):
        assert torch.equal(weights.unsigned(value, made.zero_point, bits), made.packed)
    again = weight.double() * made.scale.double()
    if excess is not None:
        again = again - excess.double()[:, None]
    close(again, made.dequantize(torch.float64), 1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("out", "width", "rows"), [(64, 128, 40), (19, 37, 3)])
def test_rows_on_a_gpu(out: int, width: int, rows: int) -> None:
    made = made_weight(out, width, symmetric=False)
    codes = torch.randint(0, 256, (rows, width), dtype=torch.uint8)
    scale, zero_point = torch.rand(rows, 1) + 0.1, torch.randint(0, 256, (rows, 1), dtype=torch.uint8)
    weight, excess = held(made)
    tensors = codes, scale, zero_point, weight, made.scale, weight.sum(1, dtype=torch.int32), excess
    y = ours.linear_rows(*(None if t is None else t.cuda() for t in tensors), None, F32)
    grids = codes, scale, zero_point, made.packed, made.scale, made.zero_point
    close(y.cpu(), reference.linear(*grids, None, "int8", "int8", 0, torch.float64))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nibbles_on_a_gpu() -> None:
    made = made_weight(64, 256, 4, False, 64)
    weight = weights.four_bits(made.packed.cuda(), 4, 256)
    assert torch.equal(weights.from_four_bits(weight, 64, 256, 4).cpu(), made.packed)
    x = torch.randn(5, 256, dtype=torch.bfloat16)
    y = ours.linear_of_nibbles(x.cuda(), weight, made.scale.cuda(), made.zero_point.cuda(), 4, 64, None)
    expected = torch.nn.functional.linear(x.double(), made.dequantize(torch.float64))
    assert sqnr_db(expected, y.cpu().double()) > 38.0
