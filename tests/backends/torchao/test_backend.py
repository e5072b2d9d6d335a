"""Whole models on the backend torchao against the oracle, called without being compiled."""

from __future__ import annotations

import copy
import functools
import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.backends.torchao import TorchAO, parts
from fxquant.errors import BackendError
from fxquant.numerics.sqnr import sqnr_db
from fxquant.pipeline.recipes import Recipe, make_recipe
from fxquant.runtime.model import GraphModel
from tests.support import count
from tests.tiny import STEPS, inputs, make_dit, run
from tests.zoo.audit import STEPS as ZOO_STEPS
from tests.zoo.models import CAPTURED, Entry
from tests.zoo.test_zoo import run as run_zoo

FLOOR = 45.0  # dB against the oracle.
FLOOR_BF16 = 38.0
WIDE = {"num_attention_heads": 4}  # Of 32 inputs a head and more, as the 4-bit kernel wants them.
RECIPES = ("rtn-w8a8", "ptq4dit-w4a8", "dynamic-w8a8", "rtn-w4a4", "rtn-w4a16", "binned")
ZOO = ("PixArtTransformer2DModel", "FluxTransformer2DModel")

ours = torch.ops.fxquant_torchao


def binned() -> Recipe:
    """HTG with a group for each calibrated timestep."""
    return make_recipe("htg-w8a8").with_options("group-timesteps", groups=len(STEPS))


UNFIT = parts.unfit


def compiled(recipe: str | Recipe, backend: str, dtype: torch.dtype = torch.float32, **options: Any) -> GraphModel:
    model = make_dit(**options).to(dtype)

    def calibration() -> None:
        for seed, step in enumerate(STEPS):
            model(**cast(inputs(timestep=step, seed=seed), dtype))

    made = binned() if recipe == "binned" else recipe
    with torch.no_grad():
        return fxquant.compile(model, recipe=made, backend=backend, calibrate=calibration, measure=0)


@functools.cache
def shared(recipe: str, backend: str = "torchao") -> GraphModel:
    return compiled(recipe, backend)


def cast(call: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in call.items()}


def mixed(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A call of five samples at five timesteps."""
    return cast(inputs(5, timestep=None, seed=6) | {"timestep": torch.tensor([999, 700, 500, 300, 0])}, dtype)


@torch.no_grad()
def sample(model: nn.Module, call: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**call).sample
    return found


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_the_oracle(recipe: str) -> None:
    mine, oracle = shared(recipe), shared(recipe, "fake-quant")
    for call in (mixed(), inputs(1, seed=2), inputs(4, timestep=100, seed=3)):
        assert sqnr_db(sample(oracle, call), sample(mine, call)) > FLOOR
    assert len(mine.graphs) == 1
    if recipe == "binned":
        assert count(mine.graphs[0], ours.linear_rows.default) > 0


@pytest.mark.parametrize("recipe", ["rtn-w8a8", "rtn-w8a16"])
def test_in_bfloat16(recipe: str) -> None:
    mine, oracle = (compiled(recipe, backend, torch.bfloat16) for backend in ("torchao", "fake-quant"))
    found, expected = (sample(model, mixed(torch.bfloat16)) for model in (mine, oracle))
    assert found.dtype == torch.bfloat16
    assert sqnr_db(expected.double(), found.double()) > FLOOR_BF16


def test_all_linears_and_the_convolution() -> None:
    made = make_recipe("rtn-w8a8", "all").with_options("assign-precision", attention="float")
    mine, oracle = (compiled(made, backend) for backend in ("torchao", "fake-quant"))
    assert sqnr_db(sample(oracle, mixed()), sample(mine, mixed())) > FLOOR
    assert count(mine.graphs[0], torch.ops.fxquant.conv2d.default) == 0
    kernels = {layer.kind: layer.kernel for layer in fxquant.report(mine).layers}
    assert kernels["linear"].startswith("onednn qlinear u8 x s8 where compiled and frozen")
    assert kernels["conv"].startswith("onednn qconv u8 x s8 where compiled and frozen")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(entry, id=entry.id, marks=[] if entry.id == "Flux2D" else [pytest.mark.exhaustive])
        for entry in CAPTURED
        if entry.name in ZOO and not entry.variant
    ],
)
def test_models_of_the_zoo(entry: Entry) -> None:
    found = []
    for backend in ("torchao", "fake-quant"):
        model = entry.model()
        made = fxquant.compile(
            model,
            recipe="ptq4dit-w8a8",
            backend=backend,
            calibrate=lambda m=model: [run_zoo(m, entry.call(step=s, seed=i)) for i, s in enumerate(ZOO_STEPS)],
            timestep=entry.timestep,
            measure=0,
        )
        found.append(run_zoo(made, entry.call(step=ZOO_STEPS[0], seed=7)))
    assert sqnr_db(found[1], found[0]) > FLOOR


# --- how models live ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["rtn-w8a8", "binned", "ptq4dit-w4a8"])
def test_a_checkpoint_is_the_oracles(recipe: str, tmp_path: Path) -> None:
    mine = shared(recipe)
    fxquant.save(mine, tmp_path / "mine")
    fxquant.save(shared(recipe, "fake-quant"), tmp_path / "oracle")
    assert (tmp_path / "mine/diffusion_pytorch_model.safetensors").read_bytes() == (
        tmp_path / "oracle/diffusion_pytorch_model.safetensors"
    ).read_bytes()
    loaded = fxquant.load(tmp_path / "mine")
    assert isinstance(loaded.backend, TorchAO)
    assert torch.equal(sample(loaded, mixed()), sample(mine, mixed()))
    other = fxquant.load(tmp_path / "mine", backend="fake-quant")
    assert torch.equal(sample(other, mixed()), sample(shared(recipe, "fake-quant"), mixed()))
    switched = fxquant.load(tmp_path / "oracle", backend="torchao")
    assert torch.equal(sample(switched, mixed()), sample(mine, mixed()))
    fxquant.save(copy.deepcopy(switched), tmp_path / "again")
    assert (tmp_path / "again/diffusion_pytorch_model.safetensors").read_bytes() == (
        tmp_path / "oracle/diffusion_pytorch_model.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_a_checkpoint_of_four_bits_in_groups(tmp_path: Path) -> None:
    mine, oracle = (compiled("rtn-w4a16-g32", backend, torch.bfloat16, **WIDE) for backend in ("torchao", "fake-quant"))
    fxquant.save(mine, tmp_path / "mine")
    fxquant.save(oracle, tmp_path / "oracle")
    assert (tmp_path / "mine/diffusion_pytorch_model.safetensors").read_bytes() == (
        tmp_path / "oracle/diffusion_pytorch_model.safetensors"
    ).read_bytes()
    assert sqnr_db(*(sample(model, mixed(torch.bfloat16)).double() for model in (oracle, mine))) > FLOOR_BF16
    loaded = fxquant.load(tmp_path / "oracle", backend="torchao")
    assert torch.equal(sample(loaded, mixed(torch.bfloat16)), sample(mine, mixed(torch.bfloat16)))


@pytest.mark.parametrize("recipe", ["rtn-w8a8", "rtn-w4a16"])
def test_a_call_of_another_size_shares_the_weights(recipe: str) -> None:
    mine, oracle = copy.deepcopy(shared(recipe)), copy.deepcopy(shared(recipe, "fake-quant"))
    call = inputs(2, size=12)
    assert sqnr_db(sample(oracle, call), sample(mine, call)) > FLOOR
    first, second = ({n: t.data_ptr() for n, t in graph.named_buffers() if "_int8" in n} for graph in mine.graphs)
    assert first == second
    clone = copy.deepcopy(mine)
    assert torch.equal(sample(clone, call), sample(mine, call))


def test_no_weight_is_held_twice_or_in_float() -> None:
    made = shared("rtn-w8a8")
    assert made.plan is not None
    tensors = made.tensors()
    integer = [name for name, layer in made.plan.layers.items() if layer.activation_bits is not None]
    for layer in integer:
        held = {name for name in tensors if name.startswith(f"{layer}.weight")}
        assert held == {f"{layer}.weight_{end}" for end in ("packed_int8", "packed_excess", "scale")}
        assert tensors[f"{layer}.weight_packed_int8"].numel() == math.prod(made.plan.layers[layer].shape)
    assert made.plan.bytes_after == sum(t.numel() * t.element_size() for t in tensors.values())


def test_a_copy_stands_alone() -> None:
    mine = compiled("rtn-w8a8", "torchao")
    clone = copy.deepcopy(mine)
    expected = sample(clone, mixed())
    for tensor in mine.tensors().values():
        tensor.zero_()
    del mine
    assert torch.equal(sample(clone, mixed()), expected)


@pytest.mark.parametrize("recipe", ["rtn-w8a8", "binned"])
def test_it_exports(recipe: str) -> None:
    mine, call = shared(recipe), mixed()
    (captured,) = mine.captured
    tensors = tuple(call[name] for name, _ in captured.call.tensors)
    with torch.no_grad():
        program = torch.export.export(captured.module, tensors)
        assert torch.equal(program.module()(*tensors)[0], sample(mine, call))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("recipe", ["rtn-w8a8", "binned", "dynamic-w8a8", "rtn-w8a16", "rtn-w4a16"])
def test_on_a_gpu(recipe: str, tmp_path: Path) -> None:
    fxquant.save(shared(recipe), tmp_path / "made")
    call = {name: value.cuda() for name, value in mixed().items()}
    loaded = fxquant.load(tmp_path / "made", device="cuda")
    oracle = sample(fxquant.load(tmp_path / "made", device="cuda", backend="fake-quant"), call)
    assert sqnr_db(oracle, sample(loaded, call)) > FLOOR
    loaded.compile(fullgraph=True)
    assert sqnr_db(oracle, sample(loaded, call)) > FLOOR


# --- what is refused ------------------------------------------------------------------------------------------------


def refused(recipe: str | Recipe, **options: Any) -> str:
    """Compiling is refused before the model is called; the message."""
    calls = []
    model = make_dit(**options)
    with pytest.raises(BackendError) as caught:
        fxquant.compile(model, recipe=recipe, backend="torchao", calibrate=lambda: calls.append(run(model)), measure=0)
    message = str(caught.value)
    assert "backend 'torchao' cannot run this plan" in message
    return message


def test_groups_behind_quantized_activations() -> None:
    message = refused("rtn-w4a8-g8")
    assert "transformer_blocks.0.attn1.to_q" in message
    assert "w4a8 in place of w4a8-g8" in message
    assert "fake-quant" in message


def test_groups_that_no_kernel_takes() -> None:
    message = refused("rtn-w4a16-g8")
    assert "multiple of 32 inputs" in message
    assert "-g32, -g64" in message
    assert "groups take at most 4 bits, not 6" in refused("rtn-w6a16-g8")


def test_quantized_attention() -> None:
    message = refused(make_recipe("rtn-w8a8", "all"))
    assert "transformer_blocks.0.attn1" in message
    assert "assign-precision{attention=float}" in message


def test_another_device() -> None:
    mine = shared("rtn-w8a8")
    assert mine.backend is not None
    with pytest.raises(BackendError, match=r"'torchao' runs on cpu, cuda, not on xpu.*fake-quant"):
        mine.backend.check_device(torch.device("xpu"))
    assert mine.to("cpu") is mine


@pytest.fixture
def without_memory() -> Any:
    """What is found out about torchao is asked again, before and after."""
    for found in (parts.missing, parts.register_fusions):
        found.cache_clear()
    yield
    for found in (parts.missing, parts.register_fusions):
        found.cache_clear()


def test_without_torchao(monkeypatch: pytest.MonkeyPatch, without_memory: None) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "torchao" else find(name))
    message = refused("rtn-w8a8")
    assert "torchao is not installed; pip install 'fxquant[torchao]', or use backend 'fake-quant'" in message
    with pytest.raises(BackendError, match="not installed"):
        parts.register_fusions()


def test_an_old_torchao(monkeypatch: pytest.MonkeyPatch, without_memory: None) -> None:
    monkeypatch.setattr(parts, "version", lambda name: "0.13.1+cpu")
    assert r"torchao 0.13.1+cpu is older than 0.18" in refused("rtn-w8a8")
    parts.missing.cache_clear()
    monkeypatch.setattr(parts, "version", lambda name: "1.0.dev20270101")
    assert parts.missing() is None


@pytest.mark.slow
def test_importing_fxquant_imports_no_torchao() -> None:
    code = (
        "import sys; sys.modules['torchao'] = None\n"  # Importing it raises ImportError.
        "import fxquant; from fxquant.pipeline.backend import BACKENDS\n"
        "print(BACKENDS['torchao'].name, sorted(BACKENDS))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("torchao [")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would do")
def test_sums_that_saturate_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes them saturate is tested in processes of their own, in tests/backends/native/test_machine.py."""
    monkeypatch.setattr(parts, "unfit", UNFIT)  # Where it refuses, the other tests replace it.
    monkeypatch.setattr(parts, "sums_exactly", lambda: False)
    with pytest.raises(BackendError, match="no VNNI instructions") as caught:
        compiled("rtn-w8a8", "torchao")
    assert "use backend 'native'" in str(caught.value)


@pytest.mark.exhaustive
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would do")
def test_processors_on_which_sums_saturate() -> None:
    code = (
        "import fxquant\nfrom tests.tiny import calibrate, make_dit\nmodel = make_dit()\n"
        "fxquant.compile(model, recipe='rtn-w8a8', backend='torchao', calibrate=calibrate(model))"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert "BackendError" in done.stderr
    assert "no VNNI instructions" in done.stderr
    assert "use backend 'native'" in done.stderr


def test_the_report_names_what_stores_weights() -> None:
    made = compiled("rtn-w4a16", "torchao", **WIDE)
    kernels = {layer.kernel for layer in fxquant.report(made).layers if layer.precision == "w4a16"}
    assert kernels == {"aten _weight_int4pack_mm in 16-bit floats; dequantize + aten float in others"}
    kernels = {layer.kernel for layer in fxquant.report(shared("dynamic-w8a8")).layers if layer.precision == "w8a8"}
    assert kernels == {"_int_mm, rows scaled behind it; compiled and frozen: onednn qlinear u8 x s8"}


@pytest.mark.parametrize("recipe", ["quarot-w4a4", "svdquant-w4a8", "svdquant-rotated-w4a4"])
def test_rotations_and_branches(recipe: str) -> None:
    made = make_recipe(recipe)
    if recipe.startswith("svdquant"):
        made = made.with_options("split-low-rank", rank=2)  # The model is 16 channels wide.
    right, found = compiled(made, "fake-quant"), compiled(made, "torchao")
    module = found.captured[0].module
    kinds = [name for name in ("hadamard", "low_rank") if count(module, getattr(torch.ops.fxquant, name).default)]
    assert kinds == {"quarot-w4a4": ["hadamard"], "svdquant-w4a8": ["low_rank"]}.get(recipe, ["hadamard", "low_rank"])
    assert count(module, torch.ops.fxquant.linear.default) == 0
    assert sqnr_db(run(right), run(found)) > FLOOR
