"""Branches of low rank in the Triton linear: against float64, and in graphs against the quantized graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import fxquant
from fxquant.backends.native import Native
from fxquant.backends.native.gpu import machine, weights
from fxquant.backends.native.gpu import ops as _ops  # noqa: F401  (registers the ops)
from fxquant.backends.native.gpu.products import MOST_RANK
from fxquant.errors import BackendError
from fxquant.ir.arguments import args
from fxquant.numerics.packing import pack
from fxquant.numerics.sqnr import sqnr_db
from fxquant.pipeline.recipes import make_recipe
from tests.sampling import covering
from tests.support import count
from tests.tiny import calibrate, make_dit, run

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MISSING = machine.missing(DEVICE)
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"no Triton kernels: {MISSING}")
native, reference = torch.ops.fxquant_native, torch.ops.fxquant
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def product(inner: Tensor | None, up: Tensor | None, rows: int, out: int, op: Any = None, **rest: Any) -> Any:
    """The op, and the exact product without the branch, of random codes."""
    torch.manual_seed(1)
    codes, held = (torch.randint(0, 256, shape, dtype=torch.uint8) for shape in ((2, rows, 40), (out, 40)))
    grid, w_scale = (torch.tensor(0.02), torch.tensor(120, dtype=torch.uint8)), torch.rand(out, 1) * 0.05
    zero = torch.full((out, 1), 128, dtype=torch.uint8)
    weight = weights.kernel_codes(pack(held, 8), zero, 8, 40, False, 0)
    sums = weights.sums(pack(held, 8), w_scale, zero, 8, 40, 0)
    options = {"bias": None, "activation": "none", "gate": None, "residual": None, "scale": None, "zero": None} | rest
    after = (options["gate"], options["residual"], options["scale"], options["zero"], 255, torch.float32, 0)
    given = (native.signed(codes), *grid, weight, w_scale, zero, sums, options["bias"], 8, out, options["activation"])
    arguments = (*given, *after, None, None, inner, up)
    moved = [value.to(DEVICE) if isinstance(value, Tensor) else value for value in arguments]
    found = (op or native.triton_linear)(*moved)
    return found, (codes.double() - 120) * 0.02 @ ((held.double() - 128) * w_scale.double()).t()


@pytest.mark.parametrize(("rank", "rows", "out", "dtype"), covering([1, 33, MOST_RANK], [1, 17], [5, 130], FLOATS))
def test_branches_are_added_before_what_follows(rank: int, rows: int, out: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inner, up = torch.randn(2, rows, rank).to(dtype), torch.randn(out, rank).to(dtype)
    bias, gate, residual = torch.randn(out), torch.randn(2, 1, out), torch.randn(2, rows, out)
    found, right = product(inner, up, rows, out)
    right = right + inner.double() @ up.double().t()
    assert sqnr_db(right, found.cpu()) > 90.0
    found, _ = product(inner, up, rows, out, bias=bias, gate=gate, residual=residual)
    assert sqnr_db((right + bias) * gate + residual, found.cpu()) > 90.0
    grid = {"scale": torch.tensor(0.1), "zero": torch.tensor(9, dtype=torch.uint8)}
    codes, _ = product(inner, up, rows, out, bias=bias, activation="gelu_tanh", **grid)
    values = functional.gelu(right + bias, approximate="tanh") / 0.1
    assert (codes.cpu().double() + 128 - values.round().add(9).clamp(0, 255)).abs().max() <= 1
    (same, sums), _ = product(
        inner, up, rows, out, native.triton_linear_sums, bias=bias, activation="gelu_tanh", **grid
    )
    assert torch.equal(same, codes)
    assert torch.equal(sums, codes.sum(-1, keepdim=True, dtype=torch.int32))


@pytest.mark.parametrize(
    ("inner", "up", "message"),
    [
        (torch.zeros(2, 3, 8), None, "only one of them is given"),
        (torch.zeros(2, 3, 8), torch.zeros(16, 4), "not .2, 3, 8. and .16, 4."),
        (torch.zeros(2, 4, 8), torch.zeros(16, 8), "not .2, 4, 8."),
        (torch.zeros(2, 3, 8), torch.zeros(16, 8, dtype=torch.bfloat16), "float32 and torch.bfloat16"),
        (torch.zeros(2, 3, 2 * MOST_RANK), torch.zeros(16, 2 * MOST_RANK), f"rank 1 to {MOST_RANK}"),
    ],
)
def test_branches_that_do_not_fit_are_refused(inner: Tensor, up: Tensor | None, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        product(inner, up, 3, 16)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="models are on the CPU, where there is no interpreter")
def test_models_with_branches(tmp_path: Path) -> None:
    model, options = make_dit(sample_size=4), {"size": 4}  # Few tokens, because the interpreter is slow.
    calibration: Any = calibrate(model, **options)
    recipe = make_recipe("svdquant-w8a8").with_options("split-low-rank", rank=4)
    right = fxquant.compile(model, recipe=recipe, calibrate=calibration, measure=0)
    fxquant.save(right, tmp_path / "right")
    ours = fxquant.load(tmp_path / "right", backend=Native("triton"))
    module = ours.captured[0].module
    linears = [
        node
        for node in module.graph.nodes
        if node.target in (native.triton_linear.default, native.triton_linear_sums.default)
    ]
    assert count(module, reference.low_rank.default) == 0
    assert any(args(node).inner is not None and args(node).activation == "gelu_tanh" for node in linears)
    assert any(args(node).inner is not None and args(node).residual is not None for node in linears)
    assert sqnr_db(run(right, **options), run(ours, **options)) > 45.0
    apart = fxquant.load(tmp_path / "right", backend=Native("triton", branches="separate")).captured[0].module
    assert count(apart, reference.low_rank.default) == count(right.captured[0].module, reference.low_rank.default) > 0
    fxquant.save(ours, tmp_path / "ours")
    again = fxquant.load(tmp_path / "ours", backend="fake-quant")
    assert torch.equal(run(again, **options), run(right, **options))
