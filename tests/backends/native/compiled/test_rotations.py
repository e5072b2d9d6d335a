"""Fast rotations of channels against the product with the matrix."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fxquant
from fxquant.backends.native import machine
from fxquant.backends.native.compiled import ops as _ops  # noqa: F401  (registers the ops)
from fxquant.numerics.hadamard import rotate
from fxquant.numerics.sqnr import sqnr_db
from tests.support import count
from tests.tiny import calibrate, make_dit, run

pytestmark = pytest.mark.skipif(machine.missing_kernels() is not None, reason="there are no compiled kernels here")
native = torch.ops.fxquant_native

SHAPES = [(8, 1), (6, 2), (12, 4), (72, 8), (48, 16), (96, 32), (192, 64), (1152, 128), (512, 256), (512, 512)]


def random_signs(channels: int) -> torch.Tensor:
    return torch.randint(0, 2, (channels,), dtype=torch.int8) * 2 - 1


@pytest.mark.parametrize(("channels", "block"), SHAPES)
def test_the_transform_is_the_product(channels: int, block: int) -> None:
    torch.manual_seed(0)
    x, signs = torch.randn(3, 5, channels), random_signs(channels)
    right = rotate(x.double(), signs, block)
    assert sqnr_db(right, native.hadamard(x, signs, block)) > 130.0
    for dtype, floor in ((torch.bfloat16, 50.0), (torch.float16, 65.0)):
        found = native.hadamard(x.to(dtype), signs, block)
        assert found.dtype == dtype
        assert sqnr_db(rotate(x.to(dtype).double(), signs, block), found) > floor
    assert native.hadamard(x[:0], signs, block).shape == (0, 5, channels)
    turned = x.transpose(0, 1)
    assert torch.equal(native.hadamard(turned, signs, block), native.hadamard(turned.contiguous(), signs, block))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (3, 1, 1), (3, 5, 1)])
def test_codes_are_those_of_the_rotated_values(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, signs = torch.randn(3, 5, 72).to(dtype), random_signs(72)
    scale, zero_point = torch.rand(shape) * 0.2 + 0.3, torch.randint(0, 16, shape, dtype=torch.uint8)
    steps = native.hadamard(x, signs, 8).double() / scale.double()
    found = native.hadamard_quantize(x, signs, 8, scale, zero_point, 15)
    distance = (found.double() - (steps.round() + zero_point.double()).clamp(0, 15)).abs()
    assert found.dtype == torch.uint8
    assert (distance[(steps - steps.floor() - 0.5).abs() > 1e-4] == 0).all()
    assert distance.max() <= 1


@pytest.mark.parametrize(
    ("signs", "block", "message"),
    [
        (torch.ones(8, dtype=torch.int8), 4, "signs are int8"),
        (torch.ones(12), 4, "signs are int8"),
        (torch.ones(12, dtype=torch.int8), 3, "blocks of 3 channels"),
        (torch.ones(12, dtype=torch.int8), 8, "blocks of 8 channels"),
    ],
)
def test_what_does_not_fit_is_refused(signs: torch.Tensor, block: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        native.hadamard(torch.zeros(2, 12), signs, block)


def test_models_with_rotations(tmp_path: Path) -> None:
    model = make_dit()
    right = fxquant.compile(model, recipe="quarot-w4a4", calibrate=calibrate(model), measure=0)
    fxquant.save(right, tmp_path / "right")
    found = fxquant.load(tmp_path / "right", backend="native{kernels=compiled attention=float}")
    module = found.captured[0].module
    assert count(module, native.hadamard_quantize.default) == 4
    assert count(module, torch.ops.fxquant.hadamard.default) == 0
    assert sqnr_db(run(right), run(found)) > 40.0  # A code that is rounded to the other neighbor costs this at 4 bits.
