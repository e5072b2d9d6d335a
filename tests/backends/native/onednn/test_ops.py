"""Integer products against sums in int64, and against the reference op."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fxquant.backends.native.onednn import ops as _ops  # noqa: F401  (registers the ops)
from fxquant.backends.native.onednn import products
from fxquant.backends.native.onednn.weights import missing_offset, prepacked, sums
from fxquant.numerics.weights import QuantizedWeight, quantize_weight

native = torch.ops.fxquant_native
F32 = torch.float32


@pytest.fixture(params=["whole", "halves"])
def any_machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the kernel as it is, and as where its 16-bit sums would saturate."""
    if request.param == "halves":
        monkeypatch.setattr(products, "sums_exactly", lambda: False)
    elif not products.sums_exactly():
        pytest.skip("this processor has no VNNI instructions")
    return str(request.param)


def made_weight(out: int, width: int, bits: int = 8, symmetric: bool = True) -> QuantizedWeight:
    torch.manual_seed(out + width)
    return quantize_weight(torch.randn(out, width) + 0.2, bits=bits, symmetric=symmetric)


def run_linear(
    codes: Tensor, scale: Tensor, zero_point: Tensor, made: QuantizedWeight, bias: Tensor | None, rows: bool = False
) -> Tensor:
    """What the lowering makes of one linear."""
    grid = made.packed, made.zero_point, made.bits, made.in_features
    weight, summed = prepacked(*grid), sums(*grid) if rows else None
    y = native.linear(codes, scale, zero_point, weight, made.scale, made.zero_point, summed, bias, made.bits, F32)
    offset = missing_offset(made.scale, made.zero_point, made.bits)
    if offset is None:
        return y
    return native.add_missing(y, native.input_sums(codes, scale, zero_point), offset, F32)


def reference(codes: Tensor, scale: Tensor, zero_point: Tensor, made: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """The reference op in float64."""
    factors = codes, scale, zero_point, made.packed, made.scale, made.zero_point, bias
    return torch.ops.fxquant.linear(*factors, "int8", made.format, 0, torch.float64)


def close(actual: Tensor, expected: Tensor, ratio: float = 2e-6) -> None:
    assert actual.shape == expected.shape
    assert float((actual.double() - expected).abs().max()) <= ratio * float(expected.abs().max())


@pytest.mark.parametrize("width", [1, 8, 37, 1152, 4608])
@pytest.mark.parametrize(("out", "rows"), [(1, 1), (19, 3), (64, 7), (1152, 32)])
@pytest.mark.parametrize("zero_point", [0, 3, 128, 255])
@pytest.mark.parametrize("values", ["extreme", "random"])
def test_sums_are_those_of_int64(
    width: int, out: int, rows: int, zero_point: int, values: str, any_machine: str
) -> None:
    generator = torch.Generator().manual_seed(width)
    if values == "extreme":
        codes = torch.full((rows, width), 255, dtype=torch.uint8)
        codes[1::2] = 0
        weight = torch.full((out, width), 255, dtype=torch.uint8)
        weight[::2] = 0
    else:
        codes, weight = (
            torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            for shape in ((rows, width), (out, width))
        )
    middle = torch.full((out, 1), 128, dtype=torch.uint8)
    y = native.linear(
        codes, torch.tensor(1.0), torch.tensor(zero_point, dtype=torch.uint8), prepacked(weight, middle, 8, width),
        torch.ones(out, 1), middle, None, None, 8, F32,
    )  # fmt: skip
    exact = (codes.long() - zero_point) @ (weight.long() - 128).t()
    if any_machine == "whole":
        assert torch.equal(y, exact.float())  # The integer, rounded to float32 once.
    else:
        torch.testing.assert_close(y.double(), exact.double(), rtol=3e-7, atol=16.0)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 48), (3, 1, 37), (4, 16), (1, 1)])
def test_it_is_the_reference_op(bits: int, symmetric: bool, shape: tuple[int, ...], any_machine: str) -> None:
    made = made_weight(21, shape[-1], bits, symmetric)
    codes = torch.randint(0, 256, shape, dtype=torch.uint8)
    grid = torch.tensor(0.03), torch.tensor(101, dtype=torch.uint8)
    bias = torch.randn(21)
    close(run_linear(codes, *grid, made, bias), reference(codes, *grid, made, bias))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("bias_rows", [True, False])
@pytest.mark.parametrize("tokens", [(), (5,)])
def test_a_grid_and_a_bias_a_sample(
    symmetric: bool, same: bool, bias_rows: bool, tokens: tuple[int, ...], any_machine: str
) -> None:
    made = made_weight(21, 48, 8, symmetric)
    codes = torch.randint(0, 256, (3, *tokens, 48), dtype=torch.uint8)
    ones = [1] * len(tokens)
    scale = torch.tensor([0.01, 0.02, 0.07]).reshape(3, *ones, 1)
    zero_point = torch.tensor([0, 130, 255], dtype=torch.uint8).reshape(3, *ones, 1)
    bias = torch.randn(3, *ones, 21) if bias_rows else torch.randn(21)
    if same:
        scale, zero_point = scale[1:2].expand(3, *scale.shape[1:]), zero_point[:1]
        bias = bias[:1] if bias_rows else bias
    close(run_linear(codes, scale, zero_point, made, bias), reference(codes, scale, zero_point, made, bias))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(2, 5, 48), (3, 48)])
def test_a_grid_a_token(bits: int, shape: tuple[int, ...], any_machine: str) -> None:
    made = made_weight(21, 48, bits, symmetric=False)
    codes = torch.randint(0, 256, shape, dtype=torch.uint8)
    scale = torch.rand(*shape[:-1], 1) + 0.01
    zero_point = torch.randint(0, 256, (*shape[:-1], 1)).float()
    bias = torch.randn(21)
    close(run_linear(codes, scale, zero_point, made, bias, rows=True), reference(codes, scale, zero_point, made, bias))


@pytest.mark.parametrize("qmax", [255, 63])
@pytest.mark.parametrize("samples", [False, True])
def test_gelu_and_quantization_in_the_kernel(qmax: int, samples: bool, any_machine: str) -> None:
    made = made_weight(40, 48)
    codes = torch.randint(0, 256, (2, 5, 48), dtype=torch.uint8)
    grid = torch.tensor(0.01), torch.tensor(120, dtype=torch.uint8)
    out = torch.tensor(0.03), torch.tensor(9, dtype=torch.uint8)
    if samples:
        out = torch.tensor([0.03, 0.05])[:, None, None], torch.tensor([9, 30], dtype=torch.uint8)[:, None, None]
    weight = prepacked(made.packed, made.zero_point, 8, 48)
    found = native.linear_gelu(codes, *grid, weight, made.scale, made.zero_point, torch.ones(40), 8, *out, qmax)
    y = functional.gelu(reference(codes, *grid, made, torch.ones(40)), approximate="tanh")
    expected = torch.ops.fxquant.quantize(y, *out, f"int{qmax.bit_length()}")
    assert found.dtype == torch.uint8
    assert expected.unique().numel() > 30
    assert int((found.int() - expected.int()).abs().max()) <= 1
    assert float((found != expected).float().mean()) < 0.01  # Ties of a rounding, of either formula.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, any_machine: str) -> None:
    made = made_weight(21, 48)
    codes = torch.randint(0, 256, (2, 5, 48), dtype=torch.uint8)
    grid = torch.tensor(0.01), torch.tensor(120, dtype=torch.uint8)
    weight = prepacked(made.packed, made.zero_point, 8, 48)
    y = native.linear(codes, *grid, weight, made.scale, made.zero_point, None, torch.ones(21, dtype=dtype), 8, dtype)
    assert y.dtype == dtype
    close(y, reference(codes, *grid, made, torch.ones(21)), max(1e-6, torch.finfo(dtype).eps))


def test_no_sample_at_all() -> None:
    made = made_weight(21, 48)
    codes = torch.empty(0, 5, 48, dtype=torch.uint8)
    y = run_linear(codes, torch.tensor(0.01), torch.tensor(120, dtype=torch.uint8), made, None)
    assert y.shape == (0, 5, 21)


def test_quantize_is_the_reference_bit_for_bit() -> None:
    x = torch.randn(3, 7, 40) * 3
    grid = torch.rand(3, 1, 1) * 0.02 + 0.01, torch.randint(0, 255, (3, 1, 1), dtype=torch.uint8)
    assert torch.equal(native.quantize(x, *grid, 255), torch.ops.fxquant.quantize(x, *grid, "int8"))
