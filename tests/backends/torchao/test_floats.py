"""Products of 8-bit floats on the backend torchao: the ops, whole models, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fxquant
from fxquant.backends.torchao import TorchAO, ops, parts
from fxquant.errors import BackendError
from fxquant.numerics.sqnr import sqnr_db
from tests.support import count
from tests.tiny import calibrate, inputs, make_dit, run

CPU = torch.device("cpu")
REASON = parts.missing() or parts.without_floats(CPU)
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no products of 8-bit floats: {REASON}")
ours, reference = torch.ops.fxquant_torchao, torch.ops.fxquant
FP8 = torch.float8_e4m3fn


def compiled(recipe: str, backend: str = "torchao") -> fxquant.GraphModel:
    model = make_dit()
    return fxquant.compile(model, recipe=recipe, backend=backend, calibrate=calibrate(model), measure=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (3, 1, 1), (3, 5, 1)])
def test_ops_are_those_of_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, scale = (torch.randn(3, 5, 40) * 3).to(dtype), torch.rand(shape) * 0.02 + 0.01
    x[0, 0, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan]).to(dtype)
    codes = ours.quantize_floats(x, scale)
    assert codes.dtype == FP8
    assert torch.equal(codes.view(torch.uint8), reference.quantize(x, scale, None, "fp8"))
    codes = ours.quantize_floats(x[1:], scale[1:] if scale.dim() else scale)
    weight, w_scale = (torch.randn(24, 40) * 100).to(FP8), torch.rand(24, 1) * 0.01
    for bias in (None, torch.randn(24), torch.randn(2, 1, 24)):
        grid = codes, scale[1:] if scale.dim() else scale
        found = ours.linear_of_floats(*grid, weight, w_scale, bias, dtype)
        sides = codes.view(torch.uint8), grid[1], None, weight.view(torch.uint8), w_scale, None
        right = reference.linear(*sides, bias, "fp8", "fp8", 0, torch.float64)
        assert found.dtype == dtype and found.shape == (2, 5, 24)
        assert sqnr_db(right, found) > {torch.float32: 120.0, torch.bfloat16: 46.0, torch.float16: 64.0}[dtype]
    assert ours.linear_of_floats(codes[:0], torch.ones(()), weight, w_scale, None, dtype).shape == (0, 5, 24)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("out", "inner"), [(32, 64), (24, 40)])
def test_torch_accepts_the_arguments_on_gpus(out: int, inner: int, dtype: torch.dtype) -> None:
    """The function that tells torch.compile of the result checks arguments as the device does."""
    with FakeTensorMode():
        codes, weight = (torch.empty(rows, inner, device="cuda").to(FP8) for rows in (7, out))
        scales = torch.empty(7, 1, device="cuda"), torch.empty(out, 1, device="cuda")
        arguments: list[Tensor] = [codes, scales[0], weight, scales[1], torch.empty(out, device="cuda")]
        found = ops.linear_of_floats(*arguments, dtype)
        assert (found.shape, found.dtype, found.device.type) == ((7, out), dtype, "cuda")


@pytest.mark.parametrize(
    "recipe", ["rtn-wfp8afp8", "rtn-dynamic-wfp8afp8", pytest.param("htg-wfp8afp8", marks=pytest.mark.exhaustive)]
)
def test_models_are_the_oracle(recipe: str, tmp_path: Path) -> None:
    mine, oracle = compiled(recipe), compiled(recipe, "fake-quant")
    for call in (inputs(3, timestep=None, seed=6), inputs(1, seed=2)):
        with torch.no_grad():
            assert sqnr_db(oracle(**call).sample, mine(**call).sample) > 38.0  # A code at a tie moves by 6 %.
    module = mine.captured[0].module
    assert count(module, ours.linear_of_floats.default) > 4
    assert count(module, reference.quantize.default) == count(module, reference.linear.default) == 0
    assert "torch scaled_mm e4m3 x e4m3" in {layer.kernel for layer in fxquant.report(mine).layers}
    fxquant.save(mine, tmp_path / "mine")
    assert torch.equal(run(fxquant.load(tmp_path / "mine", backend="torchao")), run(mine))
    assert torch.equal(run(fxquant.load(tmp_path / "mine", backend="fake-quant")), run(oracle))


def test_a_compiled_product_is_the_same() -> None:
    torch.manual_seed(0)
    weight, w_scale = (torch.randn(24, 40) * 100).to(FP8), torch.rand(24, 1) * 0.01

    def layer(x: Tensor) -> Tensor:
        scale = reference.token_scale(x, "fp8")
        y: Tensor = ours.linear_of_floats(ours.quantize_floats(x, scale), scale, weight, w_scale, None, torch.float32)
        return y

    x = torch.randn(2, 5, 40)
    assert sqnr_db(layer(x), torch.compile(layer, fullgraph=True)(x)) > 100.0


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ("w8afp8", "fp8 by fp8, not fp8 by int8; choose wfp8afp8"),
        ("wfp8afp8-g8", "one fp8 scale per output channel, not per group"),
        ("wfp8afp8-tensor", "output channels of its weight share scales"),
        ("wmxfp8amxfp8", "the format mxfp8, and the products of this backend take fp8, int2"),
    ],
)
def test_what_no_product_takes_is_refused(precision: str, message: str) -> None:
    model = make_dit(attention_head_dim=16)
    with pytest.raises(BackendError, match=message):
        fxquant.compile(model, recipe=f"rtn-{precision}", backend="torchao", calibrate=calibrate(model), measure=0)


def test_devices_without_the_products_refuse_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    gpu = torch.device("cuda", 0)
    for capability, known in (((8, 0), False), ((8, 9), True), ((9, 0), True)):
        parts.without_floats.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert ("fp8" in TorchAO().on(gpu).product_formats()) == known
        described = TorchAO().describe(gpu)
        assert ("no products of fp8, because A100 has compute capability 8.0" in described) != known
    parts.without_floats.cache_clear()
    assert "fp8" in TorchAO().product_formats()
