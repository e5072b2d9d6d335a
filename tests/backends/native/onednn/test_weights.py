"""Weights as the kernels hold them lose nothing."""

from __future__ import annotations

import pytest
import torch

from fxquant.backends.native.onednn import weights
from fxquant.backends.native.onednn.weights import missing_offset, prepacked, sums, unpacked
from fxquant.errors import BackendError
from fxquant.numerics.weights import quantize_weight


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(16, 32), (19, 37), (1, 1), (3, 1152)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_code_is_found_again(bits: int, shape: tuple[int, int], symmetric: bool) -> None:
    torch.manual_seed(bits)
    made = quantize_weight(torch.randn(shape) + 0.5, bits=bits, symmetric=symmetric)
    weight = prepacked(made.packed, made.zero_point, bits, shape[1])
    assert (weight.dtype, tuple(weight.shape)) == (torch.int8, shape[::-1])
    assert torch.equal(unpacked(weight, made.zero_point, bits), made.packed)
    assert torch.equal(sums(made.packed, made.zero_point, bits, shape[1]), weight.to_dense().sum(0, dtype=torch.int32))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
def test_held_weight_and_what_it_lacks_are_the_weight(bits: int, symmetric: bool) -> None:
    torch.manual_seed(bits)
    made = quantize_weight(torch.randn(16, 32) + 0.5, bits=bits, symmetric=symmetric)
    weight = prepacked(made.packed, made.zero_point, bits, 32).to_dense().t().double() * made.scale.double()
    lacking = missing_offset(made.scale, made.zero_point, bits)
    assert (lacking is None) == (bits < 8 or symmetric)
    if lacking is not None:
        weight += lacking.double()[:, None]
    torch.testing.assert_close(weight, made.dequantize(torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("zero_point", [0, 255])
def test_extreme_codes_of_eight_bits(zero_point: int) -> None:
    packed = torch.tensor([[0, 255, 128, 127]], dtype=torch.uint8)
    offset = torch.tensor([[zero_point]], dtype=torch.uint8)
    weight = prepacked(packed, offset, 8, 4)
    assert weight.to_dense().flatten().tolist() == [-128, 127, 0, -1]
    assert torch.equal(unpacked(weight, offset, 8), packed)


@pytest.mark.parametrize(("out", "inner"), [(6, 8), (32, 64), (33, 7), (128, 1152)])
def test_prepacked_weights_are_written_and_read(out: int, inner: int) -> None:
    values = torch.randint(-128, 128, (out, inner), dtype=torch.int8)
    weight = torch.ops.onednn.qlinear_prepack(values, None)
    again = weights.from_bytes(weights.to_bytes(weight))
    assert torch.equal(again.to_dense(), values.t())
    codes = torch.randint(0, 256, (3, inner), dtype=torch.uint8)
    found = [
        torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, 3, w, torch.ones(out), torch.zeros(1, dtype=torch.int64), None, 1.0, 0, torch.float32, "none",
            [], "",
        )
        for w in (weight, again)
    ]  # fmt: skip
    assert torch.equal(*found)


def test_bytes_of_another_layout_are_refused() -> None:
    stored = weights.to_bytes(torch.ops.onednn.qlinear_prepack(torch.zeros(32, 64, dtype=torch.int8), None))
    other = stored.clone()
    other[16 + 8] ^= 1
    for damaged in (other, stored[:-1]):
        with pytest.raises(BackendError, match="export it here"):
            weights.from_bytes(damaged)
