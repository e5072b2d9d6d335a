"""Weights in float formats under float activations: the compiled kernel against decoding by the reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import fxquant
from fxquant.backends.native import machine
from fxquant.backends.native.compiled import ops as _ops  # noqa: F401  (registers the ops)
from fxquant.backends.native.compiled import weights
from fxquant.backends.native.weight_only import FLOAT_FORMATS
from fxquant.numerics.formats import FORMATS, Scales
from fxquant.numerics.sqnr import sqnr_db
from fxquant.numerics.weights import QuantizedWeight, encode_weight
from fxquant.runtime.model import GraphModel
from tests.tiny import calibrate, inputs, make_dit, run

pytestmark = pytest.mark.skipif(machine.missing_kernels() is not None, reason="there are no compiled kernels here")
native = torch.ops.fxquant_native

FOUR_BITS = ("nf4", "mxfp4", "nvfp4")
EVERY = sorted(FLOAT_FORMATS)
BFLOAT16 = [torch.bfloat16] if machine.has_bf16_products() else []
FEW, MANY = 3, 9
"""Rows of inputs that are multiplied in registers, and that are multiplied with decoded tiles."""


def product(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None, halves: bool = True) -> Tensor:
    out = weight.packed.shape[0]
    held = weights.panels(weight.packed, weight.bits, weight.in_features, halves and weight.bits == 4)
    scales, format = weights.scale_panels(weight.scale), weight.format
    result: Tensor = native.float_weight_linear(
        x, held, scales, weight.global_scale, bias, format, weight.group_size, out
    )
    return result


def grid(format: str, out: int, inner: int, group: int) -> Scales:
    """Random scales of the stored kind, none of which is NaN."""
    kind, groups = FORMATS[format], inner // group if group else 1
    if kind.scale_dtype == torch.float32:
        return Scales(torch.rand(out, groups) + 0.5)
    bytes = torch.randint(100, 127, (out, groups), dtype=torch.uint8)
    return Scales(bytes, None, torch.tensor(0.37) if kind.global_scales else None)


def group_of(format: str) -> int:
    return FORMATS[format].block or 8


# --- every code and every scale -------------------------------------------------------------------------------------


@pytest.mark.parametrize("halves", [True, False])
@pytest.mark.parametrize("format", EVERY)
def test_every_code_is_decoded_as_the_reference_does(format: str, halves: bool) -> None:
    torch.manual_seed(0)
    values = FORMATS[format].values()
    known = values.isfinite().nonzero().flatten().to(torch.uint8)
    out, inner = 37, -(-len(known) // 32) * 32
    codes = known.repeat(2)[:inner].repeat(out, 1)
    group = group_of(format)
    scales = grid(format, out, inner, group)
    weight = QuantizedWeight.from_codes(codes, scales, format=format, group_size=group)
    exact = weight.dequantize(torch.float32)
    assert exact.isfinite().all() and len(exact.unique()) > len(known) // 2
    identity = torch.eye(inner)
    assert torch.equal(product(identity, weight, halves=halves).t(), exact), "a tile of decoded weights"
    for rows in identity.split(FEW):
        found = product(rows, weight, halves=halves)
        assert torch.equal(found, rows @ exact.t()), "in registers"
    for dtype in BFLOAT16:
        rounded = product(identity.to(dtype), weight, halves=halves).t()
        assert torch.equal(rounded, weight.dequantize(dtype)), "rounded as the reference rounds"


@pytest.mark.parametrize("rows", [FEW, MANY])
@pytest.mark.parametrize("format", [name for name in EVERY if FORMATS[name].scale_dtype == torch.uint8])
def test_every_byte_of_a_scale_is_decoded_as_the_reference_does(format: str, rows: int) -> None:
    kind = FORMATS[format]
    codes = torch.zeros(256 * 2, kind.block, dtype=torch.uint8)
    codes[:, 0] = torch.tensor([1, 2**kind.bits // 2 - 2]).repeat_interleave(256)  # The least, and one of the largest.
    scale = torch.arange(256, dtype=torch.uint8).repeat(2)[:, None]
    scales = Scales(scale, None, torch.tensor(1.7e-3) if kind.global_scales else None)
    weight = QuantizedWeight.from_codes(codes, scales, format=format, group_size=kind.block)
    exact = weight.dequantize(torch.float32)[:, 0]
    x = torch.zeros(rows, kind.block)
    x[:, 0] = 1.0
    nans = exact.isnan()
    assert nans.sum() == 2 * (2 if kind.global_scales else 1)
    for row in product(x, weight):
        assert torch.equal(row.isnan(), nans)
        assert torch.equal(row[~nans], exact[~nans])


@pytest.mark.parametrize("rows", [FEW, MANY])
@pytest.mark.parametrize("format", ["fp8", "fp8e5m2", "mxfp8"])
def test_codes_that_are_no_numbers_stay_so(format: str, rows: int) -> None:
    values = FORMATS[format].values()
    odd = (~values.isfinite()).nonzero().flatten()
    codes = torch.zeros(len(odd) + 1, 32, dtype=torch.uint8)
    codes[:-1, 5] = odd.to(torch.uint8)
    scales = Scales(torch.full((len(odd) + 1, 1), 127, dtype=torch.uint8).to(FORMATS[format].scale_dtype))
    weight = QuantizedWeight.from_codes(codes, scales, format=format, group_size=32)
    found = product(torch.ones(rows, 32), weight)
    expected = values[odd] * (1.0 if format == "mxfp8" else 127.0)
    torch.testing.assert_close(found, torch.cat([expected, torch.zeros(1)]).expand(rows, -1), equal_nan=True)


# --- shapes, groups and dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 6, 7, 13, 23, 530])
@pytest.mark.parametrize(
    ("format", "group", "inner"),
    [
        *(("nf4", 0, 75), ("nf4", 8, 72), ("nf4", 24, 288), ("mxfp4", 32, 160), ("nvfp4", 16, 304), ("fp8", 0, 75)),
        *(("fp8", 16, 336), ("fp8e5m2", 0, 75), ("mxfp8", 32, 288), ("mxfp6", 32, 288), ("mxfp6e3m2", 32, 96)),
    ],
)
def test_products(format: str, group: int, inner: int, rows: int) -> None:
    torch.manual_seed(0)
    weight = encode_weight(torch.randn(40, inner), format=format, group_size=group)
    x, bias = torch.randn(rows, inner), torch.randn(40)
    for halves in {True, weight.bits != 4}:
        for added in (None, bias):
            right = functional.linear(
                x.double(), weight.dequantize(torch.float64), None if added is None else added.double()
            )
            assert sqnr_db(right, product(x, weight, added, halves)) > 120.0


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("format", EVERY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype, format: str, rows: int) -> None:
    torch.manual_seed(0)
    weight = encode_weight(torch.randn(65, 96), format=format, group_size=FORMATS[format].block)
    x, bias = torch.randn(2, rows, 96).to(dtype), torch.randn(65).to(dtype)
    found = product(x, weight, bias)
    right = functional.linear(x.double(), weight.dequantize(torch.float64), bias.double())
    reference = functional.linear(x, weight.dequantize(dtype), bias)
    assert found.dtype == dtype and found.shape == (2, rows, 65)
    # Never worse than the reference, which rounds the weights to the dtype too.
    assert sqnr_db(right, found) > sqnr_db(right, reference) - 0.5


def test_a_strided_input_and_no_rows() -> None:
    torch.manual_seed(0)
    weight = encode_weight(torch.randn(33, 32), format="nf4")
    x = torch.randn(32, 9).t()
    assert torch.equal(product(x, weight), product(x.contiguous(), weight))
    assert product(torch.randn(0, 32), weight).shape == (0, 33)
    assert product(torch.randn(32), weight).shape == (33,)


@pytest.mark.parametrize("rows", [1, 1100])
def test_threads_share_panels_and_rows(rows: int) -> None:
    torch.manual_seed(0)
    weight = encode_weight(torch.randn(200, 1024), format="nvfp4", group_size=16)
    x, before, found = torch.randn(rows, 1024), torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(product(x, weight))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize("out", [1, 32, 40])
def test_scales_lead_back(out: int, dtype: torch.dtype, groups: int) -> None:
    scale = (torch.rand(out, groups) * 200).to(dtype)
    held = weights.scale_panels(scale)
    assert held.shape == (-(-out // 32), groups, 32) and held.dtype == dtype
    assert torch.equal(weights.scales(held, out), scale)


def test_what_does_not_fit_is_refused() -> None:
    weight = encode_weight(torch.randn(40, 64), format="nvfp4", group_size=16)
    held, scales = weights.panels(weight.packed, 4, 64, True), weights.scale_panels(weight.scale)
    x, whole = torch.zeros(2, 64), weight.global_scale

    def call(*arguments: object) -> Tensor:
        result: Tensor = native.float_weight_linear(*arguments)
        return result

    with pytest.raises(RuntimeError, match="do not decode weights of the format int4"):
        call(x, held, scales, whole, None, "int4", 16, 40)
    with pytest.raises(RuntimeError, match="a weight of 32 inputs and 40 outputs in panels is"):
        call(x[:, :32], held, scales, whole, None, "nvfp4", 16, 40)
    with pytest.raises(RuntimeError, match="scales in panels, for 64 inputs in groups of 32"):
        call(x, held, scales, whole, None, "nvfp4", 32, 40)
    with pytest.raises(RuntimeError, match="one scale of the tensor"):
        call(x, held, scales, None, None, "nvfp4", 16, 40)
    with pytest.raises(RuntimeError, match="a bias of shape"):
        call(x, held, scales, whole, torch.zeros(39), "nvfp4", 16, 40)
    with pytest.raises(RuntimeError, match="reads float32, bfloat16 and float16, not Double"):
        call(x.double(), held, scales, whole, None, "nvfp4", 16, 40)


# --- models ---------------------------------------------------------------------------------------------------------

WIDE = {"num_attention_heads": 2, "attention_head_dim": 16}


def compiled(recipe: str, backend: str = "native{attention=float}") -> GraphModel:
    model = make_dit(**WIDE)
    return fxquant.compile(model, recipe=recipe, backend=backend, measure=0, calibrate=calibrate(model))


def count_ops(model: GraphModel) -> tuple[int, int]:
    """How many linears the kernel multiplies, and how many weights the reference decodes."""
    found = [str(node.target) for graph in model.graphs for node in graph.graph.nodes]
    return found.count("fxquant_native.float_weight_linear.default"), found.count("fxquant.dequantize_weight.default")


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    ["rtn-wnf4a16", "rtn-wnf4a16-g16", "rtn-wmxfp4a16", "rtn-wnvfp4a16"]
    + [pytest.param(f"rtn-w{name}a16", marks=pytest.mark.exhaustive) for name in EVERY if name not in FOUR_BITS],
)
def test_a_model_is_that_of_the_reference(recipe: str, tmp_path: Path) -> None:
    ours, oracle = compiled(recipe), compiled(recipe, "fake-quant")
    multiplied, decoded = count_ops(ours)
    assert multiplied >= 6 and decoded == 0
    assert sqnr_db(run(oracle), run(ours)) > 100.0
    name = recipe.removeprefix("rtn-w").partition("a16")[0]
    assert f"native weight-only {name}, float32 sums" in {layer.kernel for layer in fxquant.report(ours).layers}
    assert ours.plan is not None
    for layer in (layer for layer, plan in ours.plan.layers.items() if plan.weight_format is not None):
        held = {key.removeprefix(f"{layer}.weight_") for key in ours.tensors() if key.startswith(f"{layer}.weight")}
        assert held - {"global_scale"} == {"packed_panels", "scale_in_panels"}, "no weight is held twice or in float"
    stored, expected = ours.stored_tensors(), oracle.stored_tensors()
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[key], expected[key]) for key in stored)
    fxquant.save(ours, tmp_path / "model")
    loaded = fxquant.load(tmp_path / "model", backend="native{attention=float}")
    assert torch.equal(run(loaded), run(ours))
    other = inputs(size=4)
    with torch.no_grad():
        assert sqnr_db(oracle(**other).sample, ours(**other).sample) > 100.0
    assert len(ours.graphs) == 2 and count_ops(ours) == (2 * multiplied, 0)


def test_a_model_in_bfloat16_keeps_its_scales() -> None:
    ours, oracle = compiled("rtn-wnf4a16-g16"), compiled("rtn-wnf4a16-g16", "fake-quant")
    scales = {name: value for name, value in ours.stored_tensors().items() if name.endswith("weight_scale")}
    ours.to(torch.bfloat16)
    oracle.to(torch.bfloat16)
    assert scales and all(torch.equal(ours.stored_tensors()[name], value) for name, value in scales.items())
    call = inputs() | {"hidden_states": inputs()["hidden_states"].bfloat16()}
    with torch.no_grad():
        assert sqnr_db(oracle(**call).sample.float(), ours(**call).sample.float()) > 35.0


@pytest.mark.parametrize("recipe", ["rtn-wnf4a16-g4", "rtn-wfp8a16-b16", "rtn-wnf4a16-tensor"])
def test_what_the_kernel_lacks_is_decoded_by_the_reference_and_named(recipe: str) -> None:
    ours, oracle = compiled(recipe), compiled(recipe, "fake-quant")
    multiplied, decoded = count_ops(ours)
    assert multiplied == 0 and decoded >= 6
    kernels = {layer.kernel for layer in fxquant.report(ours).layers if layer.role == "block"}
    assert kernels == {"dequantize + aten float"}
    torch.testing.assert_close(run(ours), run(oracle), rtol=1e-4, atol=1e-5)
