"""Whole models on the native backend against the oracle."""

from __future__ import annotations

import copy
import functools
import math
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fxquant
from fxquant.backends.native import Native, machine
from fxquant.backends.native.compiled import weights as panels
from fxquant.backends.native.gpu import machine as gpus
from fxquant.backends.native.onednn import weights
from fxquant.errors import BackendError, ConfigurationError
from fxquant.numerics.sqnr import sqnr_db
from fxquant.pipeline.recipes import Recipe, make_recipe
from fxquant.runtime.model import GraphModel
from fxquant.testing import own_recipes
from tests.support import count
from tests.tiny import calibrate, inputs, make_dit, run
from tests.zoo.audit import STEPS
from tests.zoo.models import CAPTURED, Entry
from tests.zoo.test_zoo import run as run_zoo

FLOOR = {"float": 45.0, "onednn": 45.0, "bf16": 38.0, "triton": 45.0}  # dB against the oracle.
OTHERS = ["rtn-w6a6", "rtn-w8a16", "rtn-w4a16-g8", "ptq4dit-gptq-w4a8", "rtn-wnf4a16", "rtn-wnvfp4a16"]
NAMES = [f"{name}-{('w8a8', 'w4a8')[number % 2]}" for number, name in enumerate(own_recipes())] + OTHERS
"""Every recipe with one number of bits, by turns, and others."""
OTHER_BITS = [f"{name}-{('w4a8', 'w8a8')[number % 2]}" for number, name in enumerate(own_recipes())]
"""Every recipe with the other number of bits: exhaustive, but for those that run in all kernels."""
EVERYWHERE = ["rtn-w8a8", "ptq4dit-w4a8"]
ZOO = ("PixArtTransformer2DModel", "SD3Transformer2DModel", "FluxTransformer2DModel", "SanaTransformer2DModel",
       "WanTransformer3DModel", "HunyuanDiT2DModel", "Flux2Transformer2DModel", "AuraFlowTransformer2DModel",
       "CogVideoXTransformer3DModel", "CogView4Transformer2DModel", "LTXVideoTransformer3DModel")  # fmt: skip

ZOO_SAMPLE = ("SD32D",)
"""Identifiers of the models that ``make test`` runs; other tests of the zoo share traces."""

MISSING = machine.missing_kernels()
OWN = pytest.mark.skipif(MISSING is not None, reason=f"no compiled kernels: {MISSING}")
NOT_INTERPRETED = gpus.missing(torch.device("cpu"))  # On GPUs the same is tested by gpu/test_device.py.
INTERPRETED = pytest.mark.skipif(NOT_INTERPRETED is not None, reason=f"not interpreted: {NOT_INTERPRETED}")
KINDS = [
    pytest.param("float", marks=OWN),
    pytest.param("bf16", marks=OWN),
    pytest.param("onednn"),
    pytest.param("triton", marks=INTERPRETED),
]
each_kind = pytest.mark.parametrize("kind", KINDS)
# What is not about kernels of a GPU is not run in their interpreter, which takes a second for a call.
on_processors = pytest.mark.parametrize("kind", KINDS[:-1])


def sampled(
    values: Sequence[Any], always: Collection[Any] = (), kinds: Sequence[Any] = tuple(KINDS), never: Sequence[Any] = ()
) -> list[Any]:
    """Every pair of a value and a kind: one kind per value, by turns, and all kinds of some; the rest is exhaustive.

    Of the values of ``never``, only those of ``always`` are not exhaustive.
    """
    pairs = []
    for number, value in enumerate((*values, *never)):
        for place, kind in enumerate(kinds):
            (name,) = kind.values
            its_turn = number < len(values) and place == number % len(kinds)
            rest = () if value in always or its_turn else (pytest.mark.exhaustive,)
            case = f"{getattr(value, 'id', value)}-{name}"
            pairs.append(pytest.param(value, name, marks=[*kind.marks, *rest], id=case))
    return pairs


def runner(kind: str) -> str | Native:
    """The oracle, Triton's or oneDNN's kernels, or the compiled ones with attention in float or in bfloat16."""
    if kind == "oracle":
        return "fake-quant"
    return Native(kind) if kind in ("onednn", "triton") else Native("compiled", attention=kind)


def size_of(kind: str) -> int:
    """Width of the latents. The interpreter gets fewer tokens, because each takes it a twentieth of a second."""
    return 4 if kind == "triton" else 8


def compiled(recipe: str | Recipe, kind: str, layers: str = "default", size: int | None = None) -> GraphModel:
    size = size or size_of(kind)
    model, backend = make_dit(sample_size=size), runner(kind)
    made = make_recipe(recipe, layers)
    if any(step.name == "reconstruct-blocks" for step in made.convert):
        made = made.with_options("reconstruct-blocks", iterations=3)
    return fxquant.compile(model, recipe=made, backend=backend, calibrate=calibrate(model, size=size), measure=0)


@functools.cache
def shared(recipe: str | Recipe, kind: str, layers: str = "default", size: int | None = None) -> GraphModel:
    """A model that tests only call; those that change it take a copy."""
    return compiled(recipe, kind, layers, size)


@functools.cache
def symmetric(recipe: str) -> Recipe:
    return make_recipe(recipe).with_options("quantize-linears", symmetric=True)


def oracle_of(kind: str, recipe: str | Recipe, layers: str = "default") -> GraphModel:
    """The same model of the oracle, with latents of the same size."""
    return shared(recipe, "oracle", layers, size_of(kind))


def mixed(kind: str) -> dict[str, Tensor]:
    """A call of five samples at five timesteps."""
    call = inputs(5, timestep=None, size=size_of(kind), seed=6)
    return call | {"timestep": torch.tensor([999, 700, 500, 300, 0])}


@torch.no_grad()
def sample(model: nn.Module, call: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**call).sample
    return found


@pytest.mark.parametrize(("recipe", "kind"), sampled(NAMES, EVERYWHERE, never=OTHER_BITS))
def test_every_recipe_is_the_oracle(recipe: str, kind: str) -> None:
    ours, oracle, size = shared(recipe, kind), oracle_of(kind, recipe), size_of(kind)
    calls = [mixed(kind), inputs(1, size=size, seed=2), inputs(4, timestep=100, size=size, seed=3)]
    for call in calls[: 2 if kind == "triton" else 3]:
        assert sqnr_db(sample(oracle, call), sample(ours, call)) > FLOOR[kind]
    assert len(ours.graphs) == 1


@pytest.mark.parametrize(("recipe", "kind"), sampled(["rtn-w8a8", "htg-w8a8", "rtn-w4a8"], ["rtn-w8a8"]))
def test_symmetric_weights_run_in_the_kernels_alone(recipe: str, kind: str) -> None:
    ours, oracle = compiled(symmetric(recipe), kind), oracle_of(kind, symmetric(recipe))
    assert sqnr_db(sample(oracle, mixed(kind)), sample(ours, mixed(kind))) > FLOOR[kind]
    if kind == "onednn":
        assert count(ours.graphs[0], torch.ops.fxquant_native.add_missing.default) == 0
        assert count(ours.graphs[0], torch.ops.fxquant_native.linear_gelu.default) == 1


@each_kind
def test_all_layers_convolution_and_attention_too(kind: str) -> None:
    ours, oracle = shared("rtn-w8a8", kind, "all"), oracle_of(kind, "rtn-w8a8", "all")
    assert sqnr_db(sample(oracle, mixed(kind)), sample(ours, mixed(kind))) > FLOOR[kind]
    report = fxquant.report(ours)
    names = {layer.kind: layer.kernel for layer in report.layers}
    assert names["conv"] == "fxquant::conv2d (reference, float)"
    own = found.short if (found := machine.instructions()) is not None else ""
    linear, attention = {
        "onednn": ("onednn qlinear u8 x s8", "fxquant::matmul (reference)"),
        "triton": ("native triton s8 x s8", "native triton attention s8 x s8"),
    }.get(kind, (f"native {own} u8 x s8", f"native {own} attention u8 x s8"))
    assert names["linear"].startswith(linear)
    assert {row.kernel for row in report.attentions} == {attention}


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "kind"), sampled([(1, 4, 2), (3, 12, 6), (2, 22, 10)]))
def test_odd_shapes(shape: tuple[int, int, int], kind: str) -> None:
    """One token; widths that are no multiple of any block."""
    call = inputs(3, timestep=None, size=shape[-1])
    assert sqnr_db(sample(odd(shape, "oracle"), call), sample(odd(shape, kind), call)) > FLOOR[kind]


@functools.cache
def odd(shape: tuple[int, int, int], kind: str) -> GraphModel:
    heads, width, size = shape
    model = make_dit(num_attention_heads=heads, attention_head_dim=width, sample_size=size)
    return fxquant.compile(
        model, recipe="htg-w8a8", backend=runner(kind), calibrate=calibrate(model, size=size), measure=0
    )


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "kind"), sampled([torch.bfloat16, torch.float16, torch.float64]))
def test_other_dtypes(dtype: torch.dtype, kind: str) -> None:
    size = size_of(kind)
    found = [sample(in_dtype(dtype, side, size), call_in(dtype, size)) for side in (kind, "oracle")]
    assert found[0].dtype == dtype
    # A rounding of bfloat16 that goes the other way moves a code of the next layer.
    assert sqnr_db(found[1].double(), found[0].double()) > (38.0 if dtype == torch.bfloat16 else FLOOR[kind])


def call_in(dtype: torch.dtype, size: int) -> dict[str, Tensor]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs(size=size).items()}


@functools.cache
def in_dtype(dtype: torch.dtype, kind: str, size: int) -> GraphModel:
    model, call = make_dit(sample_size=size).to(dtype), call_in(dtype, size)
    return fxquant.compile(model, recipe="rtn-w8a8", backend=runner(kind), calibrate=lambda: model(**call), measure=0)


def zoo() -> list[Any]:
    """The models of the sample with one kind each; all others, and other kinds, are exhaustive."""
    entries = [entry for entry in CAPTURED if entry.name in ZOO and not entry.variant]
    sample = sampled([entry for entry in entries if entry.id in ZOO_SAMPLE])
    rest = [
        pytest.param(
            entry, *kind.values, marks=[*kind.marks, pytest.mark.exhaustive], id=f"{entry.id}-{kind.values[0]}"
        )
        for entry in entries
        if entry.id not in ZOO_SAMPLE
        for kind in KINDS
    ]
    return [*sample, *rest]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("entry", "kind"), zoo())
def test_models_of_the_zoo(kind: str, entry: Entry) -> None:
    found = []
    for side in (kind, "oracle"):
        model, backend = entry.model(), runner(side)
        made = fxquant.compile(
            model,
            recipe="ptq4dit-w8a8",
            backend=backend,
            calibrate=lambda m=model: [run_zoo(m, entry.call(step=s, seed=i)) for i, s in enumerate(STEPS)],
            timestep=entry.timestep,
            measure=0,
        )
        found.append(run_zoo(made, entry.call(1 if kind == "triton" else 2, step=STEPS[0], seed=7)))
    assert sqnr_db(found[1], found[0]) > FLOOR[kind]


# --- how models live ------------------------------------------------------------------------------------------------


SAVED = ["rtn-w8a8", "dynamic-w8a8", "htg-w8a8", "ptq4dit-w4a8", "rtn-wnf4a16-g8", "rtn-wnvfp4a16"]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "kind"), sampled(SAVED))
def test_a_checkpoint_is_the_oracles(recipe: str, kind: str, tmp_path: Path) -> None:
    ours, oracle, backend = shared(recipe, kind), oracle_of(kind, recipe), runner(kind)
    call = mixed(kind)
    fxquant.save(ours, tmp_path / "ours")
    fxquant.save(oracle, tmp_path / "oracle")
    assert (tmp_path / "ours/diffusion_pytorch_model.safetensors").read_bytes() == (
        tmp_path / "oracle/diffusion_pytorch_model.safetensors"
    ).read_bytes()
    assert isinstance(fxquant.load(tmp_path / "ours").backend, Native)
    loaded = fxquant.load(tmp_path / "ours", backend=backend)
    expected = sample(ours, call)
    assert torch.equal(sample(loaded, call), expected)
    other = fxquant.load(tmp_path / "ours", backend="fake-quant")
    assert torch.equal(sample(other, call), sample(oracle, call))
    switched = fxquant.load(tmp_path / "oracle", backend=backend)
    assert torch.equal(sample(switched, call), expected)


@pytest.mark.slow
@each_kind
def test_a_call_of_another_size_shares_the_kernels_weights(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = copy.deepcopy(shared("rtn-w8a8", kind, "all"))
    oracle = copy.deepcopy(oracle_of(kind, "rtn-w8a8", "all"))
    call = inputs(2, size=6 if kind == "triton" else 12)
    monkeypatch.delattr(weights, "prepacked")  # Nothing is packed anew.
    monkeypatch.delattr(panels, "panels")
    assert sqnr_db(sample(oracle, call), sample(ours, call)) > FLOOR[kind]
    ends = ("_int8", "_panels", "_rows", "_divided")
    first, second = ({name for name, _ in graph.named_buffers() if name.endswith(ends)} for graph in ours.graphs)
    assert first == second
    clone = copy.deepcopy(ours)
    assert torch.equal(sample(clone, call), sample(ours, call))


@each_kind
def test_no_weight_is_held_twice_or_in_float(kind: str) -> None:
    made = shared("rtn-w8a8", kind)
    assert made.plan is not None
    tensors = made.tensors()
    integer = [name for name, layer in made.plan.layers.items() if layer.activation_bits is not None]
    for layer in integer:
        held = {name for name in tensors if name.startswith(f"{layer}.weight")}
        own = {
            "onednn": {"packed_int8", "packed_missing_offset"},
            "triton": {"packed_rows", "packed_sums", "packed_offset"},
        }.get(kind, {"packed_panels", "packed_sums"})
        assert held == {f"{layer}.weight_{end}" for end in own | {"scale", "zero_point"}}
    if kind == "onednn":
        total = sum(tensor.numel() for name, tensor in tensors.items() if name.endswith("_int8"))
        assert total == sum(math.prod(made.plan.layers[layer].shape) for layer in integer)
    assert made.plan.bytes_after == sum(t.numel() * t.element_size() for t in tensors.values())


@each_kind
def test_a_copy_stands_alone(kind: str) -> None:
    ours = compiled("rtn-w8a8", kind)
    clone = copy.deepcopy(ours)
    call = mixed(kind)
    expected = sample(ours, call)
    for tensor in ours.tensors().values():
        if tensor.layout is torch.strided:
            tensor.zero_()
    del ours
    assert torch.equal(sample(clone, call), expected)


def test_another_device_is_refused() -> None:
    ours = shared("rtn-w8a8", "onednn")
    assert ours.backend is not None
    with pytest.raises(BackendError, match=r"'native' runs on cpu, cuda, not on xpu.*fake-quant"):
        ours.backend.check_device(torch.device("xpu"))
    with pytest.raises(ConfigurationError, match=r"on the meta device a model would lose its tensors.*fxquant\.load"):
        ours.to("meta")
    assert ours.device == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would do")
def test_a_gpu_that_is_not_there_is_refused(tmp_path: Path) -> None:
    fxquant.save(shared("rtn-w8a8", "onednn"), tmp_path / "made")
    with pytest.raises(BackendError, match=r"torch finds no NVIDIA GPU here.*fake-quant"):
        Native().check_device(torch.device("cuda"))
    with pytest.raises(ConfigurationError, match=r"device 'cuda' cannot be used here: .*'cpu'"):
        fxquant.load(tmp_path / "made", device="cuda")


def test_groups_of_inputs_are_refused_before_anything_runs() -> None:
    calls = []
    model = make_dit()
    with pytest.raises(BackendError) as caught:
        fxquant.compile(
            model,
            recipe="rtn-w4a8-g8",
            backend="native{kernels=onednn}",
            calibrate=lambda: calls.append(run(model)),
            measure=0,
        )
    message = str(caught.value)
    assert "backend 'native' cannot run this plan" in message
    assert "transformer_blocks.0.attn1.to_q" in message
    assert "w4a8 in place of w4a8-g8" in message
    assert "fake-quant" in message


# --- under torch.compile --------------------------------------------------------------------------------------------


def compilers() -> list[Any]:
    """Every recipe and kind with both compilers; ``make test`` runs inductor in tests/runtime/test_torch_compile.py."""
    found = []
    for pair in sampled(["htg-w8a8", "rtn-w8a8", "ptq4dit-w4a8", "rtn-wnvfp4a16"], kinds=KINDS[-2::-1]):
        for compiler in ("inductor", "aot_eager"):
            marks = [*pair.marks, *(() if compiler == "aot_eager" else (pytest.mark.exhaustive,))]
            found.append(pytest.param(*pair.values, compiler, marks=marks, id=f"{pair.id}-{compiler}"))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "kind", "compiler"), compilers())
def test_torch_compile_serves_eight_batch_sizes_at_once(recipe: str, kind: str, compiler: str) -> None:
    ours = copy.deepcopy(shared(recipe, kind))
    counter = CompileCounterWithBackend(compiler)
    torch._dynamo.reset()
    made = torch.compile(ours, backend=counter, fullgraph=True, dynamic=True)
    for batch in range(1, 9):
        call = inputs(batch, timestep=None, seed=batch)
        assert sqnr_db(sample(ours, call), sample(made, call)) > FLOOR[kind]
    assert counter.frame_count == 1


@pytest.mark.parametrize(("recipe", "kind"), sampled(SAVED))
def test_it_exports(recipe: str, kind: str) -> None:
    ours, call = shared(recipe, kind), mixed(kind)
    (captured,) = ours.captured
    tensors = tuple(call[name] for name, _ in captured.call.tensors)
    with torch.no_grad():
        program = torch.export.export(captured.module, tensors)
        assert torch.equal(program.module()(*tensors)[0], sample(ours, call))


@on_processors
def test_two_hundred_calls_leave_nothing_behind(kind: str) -> None:
    ours = shared("htg-w8a8", kind)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    for _ in range(20):
        sample(ours, mixed(kind))
    before = resident()
    for _ in range(200):
        sample(ours, mixed(kind))
    assert resident() - before < 1 << 20  # Bytes; the outputs alone of 200 calls are twice that.
