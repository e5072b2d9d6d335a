"""Weights in float formats under float activations: the Triton kernel against decoding by the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import fxquant
from fxquant.backends.native import Native
from fxquant.backends.native.gpu import float_weights, machine, weights
from fxquant.backends.native.gpu import ops as _ops  # noqa: F401  (registers the ops)
from fxquant.backends.native.weight_only import FLOAT_FORMATS
from fxquant.errors import BackendError
from fxquant.numerics.formats import FORMATS, Scales
from fxquant.numerics.sqnr import sqnr_db
from fxquant.numerics.weights import QuantizedWeight, encode_weight
from tests.sampling import covering
from tests.tiny import calibrate, make_dit, run

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MISSING = machine.missing(DEVICE)
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"no Triton kernels: {MISSING}")
native = torch.ops.fxquant_native
EVERY = sorted(FLOAT_FORMATS)


def product(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None, halves: bool = True) -> Tensor:
    halves = halves and weight.bits == 4
    held = weights.kernel_codes(weight.packed, None, weight.bits, weight.in_features, halves, weight.group_size)
    tensors = [x, held, weight.scale, weight.global_scale, bias]
    moved = [None if value is None else value.to(DEVICE) for value in tensors]
    found: Tensor = native.triton_float_weight_linear(*moved, weight.format, weight.group_size, weight.packed.shape[0])
    return found.cpu()


def test_every_format_of_the_lowering_has_a_layout() -> None:
    assert set(float_weights.LAYOUTS) == FLOAT_FORMATS


@pytest.mark.parametrize(
    ("format", "halves"), [(name, halves) for name in EVERY for halves in {False, FORMATS[name].bits == 4}]
)
def test_every_code_is_decoded_as_the_reference_does(format: str, halves: bool) -> None:
    torch.manual_seed(0)
    kind = FORMATS[format]
    known = kind.values().isfinite().nonzero().flatten().to(torch.uint8)
    inner = -(-len(known) // 32) * 32
    codes = known.repeat(2)[:inner].repeat(5, 1)
    scale = torch.rand(5, inner // (kind.block or 8)) + 0.5
    if kind.scale_dtype == torch.uint8:
        scale = (scale * 80).to(torch.uint8)
    scales = Scales(scale, None, torch.tensor(0.37) if kind.global_scales else None)
    weight = QuantizedWeight.from_codes(codes, scales, format=format, group_size=kind.block or 8)
    exact = weight.dequantize(torch.float32)
    assert exact.isfinite().all() and len(exact.unique()) > len(known) // 2
    found = product(torch.eye(inner), weight, halves=halves).t()
    if DEVICE.type == "cuda":
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=0.0)
    else:
        assert torch.equal(found, exact)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("format", [name for name in EVERY if FORMATS[name].scale_dtype == torch.uint8])
def test_every_byte_of_a_scale_is_decoded_as_the_reference_does(format: str) -> None:
    kind = FORMATS[format]
    codes = torch.zeros(256 * 2, kind.block, dtype=torch.uint8)
    codes[:, 0] = torch.tensor([1, 2**kind.bits // 2 - 2]).repeat_interleave(256)  # The least, and one of the largest.
    scale = torch.arange(256, dtype=torch.uint8).repeat(2)[:, None]
    scales = Scales(scale, None, torch.tensor(1.7e-3) if kind.global_scales else None)
    weight = QuantizedWeight.from_codes(codes, scales, format=format, group_size=kind.block)
    exact = weight.dequantize(torch.float32)[:, 0]
    x = torch.zeros(1, kind.block)
    x[:, 0] = 1.0
    nans = exact.isnan()
    (row,) = product(x, weight)
    assert nans.sum() == 2 * (2 if kind.global_scales else 1)
    assert torch.equal(row.isnan(), nans)
    torch.testing.assert_close(row[~nans], exact[~nans], rtol=1e-6, atol=1e-38 if DEVICE.type == "cuda" else 0.0)


@pytest.mark.parametrize(
    ("format", "group", "inner", "rows", "dtype"),
    covering(
        [
            *(("nf4", 0, 75), ("nf4", 8, 72), ("nf4", 96, 288), ("mxfp4", 32, 160), ("nvfp4", 16, 304)),
            *(("fp8", 0, 75), ("fp8", 16, 208), ("fp8e5m2", 64, 192), ("mxfp8", 32, 288), ("mxfp6", 32, 160)),
            ("mxfp6e3m2", 32, 96),
        ],
        [1, 70],
        [torch.float32, torch.bfloat16, torch.float16],
    ),
)
def test_products(format: str, group: int, inner: int, rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = encode_weight(torch.randn(40, inner), format=format, group_size=group)
    x, bias = torch.randn(rows, inner).to(dtype), torch.randn(40).to(dtype)
    for added, halves in ((bias, True), (None, False)):
        right = functional.linear(
            x.double(), weight.dequantize(torch.float64), None if added is None else added.double()
        )
        found = product(x, weight, added, halves)
        assert found.dtype == dtype
        # The interpreter cuts what bfloat16 has no bits for off, which doubles the error of rounding.
        assert sqnr_db(right, found) > {torch.float32: 110.0, torch.bfloat16: 45.0, torch.float16: 66.0}[dtype]


@pytest.mark.parametrize(("format", "halves"), [("nf4", True), ("nf4", False), ("mxfp6", False), ("fp8", False)])
def test_rows_lead_back(format: str, halves: bool) -> None:
    block = FORMATS[format].block
    weight = encode_weight(torch.randn(5, 96 if block else 75), format=format, group_size=block)
    layout = weight.bits, weight.in_features
    held = weights.kernel_codes(weight.packed, None, *layout, halves, block)
    assert held.dtype == (torch.uint8 if halves else torch.int8)
    assert torch.equal(weights.unpacked(held, None, *layout, block), weight.packed)


def test_what_does_not_fit_is_refused() -> None:
    weight = encode_weight(torch.randn(40, 64), format="nvfp4", group_size=16)
    held = weights.kernel_codes(weight.packed, None, 4, 64, True, 16).to(DEVICE)
    x, scale, whole = (value.to(DEVICE) for value in (torch.zeros(2, 64), weight.scale, torch.tensor(1.0)))

    def call(*arguments: object) -> Tensor:
        result: Tensor = native.triton_float_weight_linear(*arguments)
        return result

    assert call(x[:0], held, scale, whole, None, "nvfp4", 16, 40).shape == (0, 40)
    with pytest.raises(BackendError, match=r"decodes nf4, .* not int4 in groups of 16"):
        call(x, held, scale, whole, None, "int4", 16, 40)
    with pytest.raises(BackendError, match="groups that divide 32 or are a multiple of it, not nf4 in groups of 24"):
        call(x, held, scale, None, None, "nf4", 24, 40)
    with pytest.raises(BackendError, match="must be contiguous"):
        call(x[:, :32], held, scale, whole, None, "nvfp4", 16, 40)
    with pytest.raises(BackendError, match=r"the scales of nvfp4 must be contiguous torch.uint8 \(40, 4\)"):
        call(x, held, scale.float(), whole, None, "nvfp4", 16, 40)
    with pytest.raises(BackendError, match="nvfp4 has one scale for the whole tensor"):
        call(x, held, scale, None, None, "nvfp4", 16, 40)
    with pytest.raises(BackendError, match="the bias"):
        call(x, held, scale, whole, torch.zeros(39, device=DEVICE), "nvfp4", 16, 40)
    with pytest.raises(BackendError, match="reads float32"):
        call(x.double(), held, scale, whole, None, "nvfp4", 16, 40)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["rtn-wmxfp4a16", "rtn-wnf4a16-g16", "rtn-wfp8a16"])
def test_a_model_is_that_of_the_reference(recipe: str) -> None:
    model = make_dit(sample_size=4, num_attention_heads=2, attention_head_dim=16)
    made = [
        fxquant.compile(model, recipe=recipe, backend=backend, measure=0, calibrate=calibrate(model, size=4))
        for backend in (Native("triton"), "fake-quant")
    ]
    found = [str(node.target) for node in made[0].graphs[0].graph.nodes]
    assert found.count("fxquant_native.triton_float_weight_linear.default") >= 6
    assert "fxquant.dequantize_weight.default" not in found
    assert sqnr_db(run(made[1], size=4), run(made[0], size=4)) > 100.0
    format, _, groups = recipe.removeprefix("rtn-w").partition("a16")
    name = f"native triton weight-only {format}{' in groups of 16' if groups else ''}, float32 sums"
    assert name in {layer.kernel for layer in fxquant.report(made[0]).layers}
    stored, expected = (each.stored_tensors() for each in made)
    assert stored.keys() == expected.keys() and all(torch.equal(stored[key], expected[key]) for key in stored)
