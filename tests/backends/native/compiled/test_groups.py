"""Integer products with a scale and a zero point per group of input channels."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import fxquant
from fxquant.backends.native import machine
from fxquant.backends.native.compiled import ops as _ops  # noqa: F401  (registers the ops)
from fxquant.backends.native.compiled import weights
from fxquant.errors import BackendError
from fxquant.inspect.report import report
from fxquant.numerics.packing import pack
from fxquant.numerics.sqnr import sqnr_db
from tests.support import count
from tests.tiny import calibrate, make_dit, run

pytestmark = pytest.mark.skipif(machine.missing_kernels() is not None, reason="there are no compiled kernels here")
native = torch.ops.fxquant_native


class Grouped:
    """Random codes and grids of groups, and what they stand for."""

    def __init__(self, out: int, inner: int, bits: int, size: int, symmetric: bool = False) -> None:
        self.bits, self.size, self.inner = bits, size, inner
        groups = -(-inner // size)
        self.codes = torch.randint(0, 2**bits, (out, inner), dtype=torch.uint8)
        self.scale = torch.rand(out, groups) + 0.5
        middle = torch.full((out, groups), 2 ** (bits - 1), dtype=torch.uint8)
        self.zero_point = middle if symmetric else torch.randint(0, 2**bits, (out, groups), dtype=torch.uint8)

    def arguments(self, halves: bool) -> tuple[Tensor, ...]:
        packed, grid = pack(self.codes, self.bits), (self.scale, self.zero_point)
        sums = weights.group_sums(packed, *grid, self.bits, self.inner, self.size)
        by_group = (part.t().contiguous() for part in grid)
        return weights.panels(packed, self.bits, self.inner, halves), *by_group, sums

    def values(self) -> Tensor:
        step, zero = (part.double().repeat_interleave(self.size, 1) for part in (self.scale, self.zero_point))
        return (self.codes.double() - zero[:, : self.inner]) * step[:, : self.inner]


def linear(codes: Tensor, scale: Tensor, zero_point: Tensor, weight: Grouped, halves: bool, **more: Any) -> Tensor:
    rest = {"bias": None, "activation": "none", "gate": None, "residual": None, "out_scale": None} | more
    rest = {**rest, "out_zero_point": more.get("out_zero_point"), "qmax": more.get("qmax", 255)}
    bias, *others = rest.values()
    found: Tensor = native.vnni_linear(
        codes,
        scale,
        zero_point,
        *weight.arguments(halves),
        bias,
        weight.bits,
        weight.codes.shape[0],
        *others,
        torch.float32,
        group_size=weight.size,
    )
    return found


def expected(codes: Tensor, scale: Tensor, zero_point: Tensor, weight: Grouped) -> Tensor:
    return (codes.double() - zero_point.double()) @ weight.values().t() * scale.double()


@pytest.mark.parametrize("grid", ["one", "sample", "row"])
@pytest.mark.parametrize("bits", [2, 4, 5, 8])
@pytest.mark.parametrize(
    ("tokens", "inner", "out", "size"),
    [(1, 8, 1, 4), (13, 72, 40, 8), (24, 75, 33, 32), (30, 301, 65, 64), (7, 100, 32, 128), (14, 96, 64, 12)],
)
def test_products_of_groups(tokens: int, inner: int, out: int, size: int, bits: int, grid: str) -> None:
    torch.manual_seed(0)
    codes = torch.randint(0, 256, (3, tokens, inner), dtype=torch.uint8)
    shape = {"one": (), "sample": (3, 1, 1), "row": (3, tokens, 1)}[grid]
    x = codes, torch.rand(shape) + 0.5, torch.randint(0, 256, shape, dtype=torch.uint8)
    for symmetric in (True, False):
        weight = Grouped(out, inner, bits, size, symmetric)
        for halves in {False, weights.in_halves(bits, True, size)}:
            assert sqnr_db(expected(*x, weight), linear(*x, weight, halves)) > 115.0


def test_sums_within_a_group_are_exact() -> None:
    """Float32 sums over the codes of such a group would be wrong in the last digits."""
    weight = Grouped(32, 1024, 8, 512, symmetric=True)
    weight.codes.fill_(255)
    weight.codes[:, 0] = 1
    weight.scale = torch.tensor([[1.0, 0.0]]).expand(32, 2).contiguous()
    codes = torch.full((3, 1024), 255, dtype=torch.uint8)
    codes[:, 1] = torch.tensor([254, 253, 252], dtype=torch.uint8)
    x = codes, torch.ones(()), torch.zeros((), dtype=torch.uint8)
    assert torch.equal(linear(*x, weight, False).double(), expected(*x, weight))


def test_what_follows_a_product_of_groups() -> None:
    torch.manual_seed(0)
    codes, weight = torch.randint(0, 16, (2, 17, 64), dtype=torch.uint8), Grouped(40, 64, 4, 32)
    x = codes, torch.rand(2, 1, 1) * 1e-2, torch.randint(0, 16, (2, 1, 1), dtype=torch.uint8)
    product, bias, gate = expected(*x, weight), torch.randn(2, 1, 40), torch.randn(2, 1, 40)
    residual = torch.randn(2, 17, 40)
    found = linear(*x, weight, True, bias=bias, gate=gate, residual=residual)
    torch.testing.assert_close(found, ((product + bias) * gate + residual).float(), rtol=1e-5, atol=1e-5)
    out = torch.tensor(0.05), torch.tensor(7, dtype=torch.uint8)
    steps = torch.nn.functional.silu(product) / 0.05
    found = linear(*x, weight, True, activation="silu", out_scale=out[0], out_zero_point=out[1], qmax=15)
    distance = (found.double() - (steps.round() + 7).clamp(0, 15)).abs()
    assert distance.max() <= 1
    assert (distance[(steps - steps.floor() - 0.5).abs() > 1e-3] == 0).all()


def test_groups_across_the_pairs_of_half_bytes_are_refused_by_the_kernel() -> None:
    weight = Grouped(32, 24, 4, 12)
    codes = torch.zeros(1, 24, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="groups of 12 inputs are not multiples of 8"):
        linear(codes, torch.ones(()), torch.zeros((), dtype=torch.uint8), weight, True)


@pytest.mark.parametrize(
    "recipe",
    [
        "ptq4dit-gptq-w4a4-g8",
        "dynamic-w8a8-g4",
        "rtn-w3a5-g4",
        *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("rtn-w4a8-g8", "single-step-w8a8-g8")),
    ],
)
def test_models_with_groups(recipe: str, tmp_path: Any) -> None:
    model = make_dit()
    right = fxquant.compile(model, recipe=recipe, calibrate=calibrate(model), measure=0)
    backend = "native{kernels=compiled attention=float}"
    fxquant.save(right, tmp_path / "right")
    found = fxquant.load(tmp_path / "right", backend=backend)
    module = found.captured[0].module
    assert count(module, native.vnni_linear.default) == 7
    output = run(found)
    assert sqnr_db(run(right), output) > 50.0  # A code that a fused kernel rounds to the other neighbor costs this.
    fxquant.save(found, tmp_path / "made")  # Has the tensors of the quantized graph again.
    again = fxquant.load(tmp_path / "made", backend=backend)
    assert torch.equal(run(again), output)
    assert sqnr_db(run(right), run(fxquant.load(tmp_path / "made", backend="fake-quant"))) > 120.0


def test_groups_that_no_kernel_adds_up_are_refused_by_name() -> None:
    model = make_dit()
    with pytest.raises(BackendError, match=r"attn1\.to_q.*one grid per 2 input channels.*multiple of 4.*fake-quant"):
        fxquant.compile(
            model,
            recipe="rtn-w4a8-g2",
            backend="native{kernels=compiled}",
            calibrate=calibrate(model),
            measure=0,
        )


def test_the_report_names_the_groups() -> None:
    model = make_dit()
    made = fxquant.compile(
        model, recipe="rtn-w4a8-g8", backend="native{kernels=compiled}", calibrate=calibrate(model), measure=0
    )
    assert re.search("native (vnni|avx2) u8 x u4 in groups of 8", str(report(made)))
