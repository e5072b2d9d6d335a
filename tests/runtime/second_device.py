"""A second device that computes on the CPU, and checks of models that move there. They run in a process of their own.

torch lets a package define a device in Python. Its tensors hold a tensor on the CPU; ops run on that tensor, and fail
if they get tensors of both devices, as on a GPU. torch then reports an accelerator for the rest of the process, so
tests run this module as a program: it prints the error of each check, or null, as JSON.
"""

from __future__ import annotations

import copy
import functools
import json
import sys
import tempfile
import traceback
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import accelerate
import diffusers
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import fxquant
from fxquant import api
from fxquant.backends.derived_tensors import derived
from fxquant.backends.fake_quant.backend import FakeQuant
from fxquant.capture.fidelity import Original
from fxquant.errors import BackendError, ConfigurationError
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.tensors import drop_unread_tensors, read_tensors
from fxquant.pipeline.backend import Backend
from fxquant.pipeline.recipes import make_recipe
from fxquant.planning.plan import Plan, tensor_bytes
from fxquant.runtime.model import GraphModel
from tests.adapters.loras import lora
from tests.conversions import rebuilt_once, worked_out_once
from tests.test_without_timestep import make_t5
from tests.tiny import STEPS, calibrate, inputs, make_dit, make_pipeline
from tests.traces import known_memos, memos, traced_once

GPU = torch.device("privateuseone:0")
CPU = torch.device("cpu")


class OnSecond(Tensor):
    """A tensor of the second device; ``raw`` holds its values."""

    raw: Tensor
    alive: ClassVar[weakref.WeakSet[OnSecond]] = weakref.WeakSet()
    most = 0

    @staticmethod
    def __new__(cls, raw: Tensor, requires_grad: bool = False) -> OnSecond:
        """A wrapper with the sizes of ``raw``, or another wrapper of it."""
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls, raw.size(), strides=raw.stride(), dtype=raw.dtype, device=GPU
        )

    def __init__(self, raw: Tensor, requires_grad: bool = False) -> None:
        self.raw = raw.raw if isinstance(raw, OnSecond) else raw
        OnSecond.alive.add(self)
        OnSecond.most = max(OnSecond.most, tensor_bytes({str(i): t.raw for i, t in enumerate(OnSecond.alive)}))

    def __repr__(self, **_: Any) -> str:
        return f"OnSecond({self.raw})"

    def untyped_storage(self) -> Any:
        """The memory of the values."""
        return self.raw.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs))
        mode = next((leaf.fake_mode for leaf in leaves if isinstance(leaf, FakeTensor)), None)
        if mode is None:
            return run_op(func, args, kwargs or {})
        values, options = tree_map(
            lambda leaf: mode.from_tensor(leaf) if isinstance(leaf, OnSecond) else leaf, (args, kwargs or {})
        )
        return func(*values, **options)


def run_op(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """Run an op of ATen on the values of its tensors."""
    found: set[bool] = set()

    def value(leaf: Any) -> Any:
        if isinstance(leaf, torch.device):
            return CPU
        if not isinstance(leaf, Tensor):
            return leaf
        if isinstance(leaf, OnSecond) or leaf.dim():
            found.add(type(leaf) is OnSecond)
        return leaf.raw if isinstance(leaf, OnSecond) else leaf

    name, goal = func._schema.name, kwargs.get("device")
    values, options = tree_map(value, args), tree_map(value, dict(kwargs))
    if len(found) > 1 and name not in ("aten::copy_", "aten::_copy_from"):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device")
    if name == "aten::_copy_from":
        return values[1].copy_(values[0])
    made = func(*values, **options)
    if func._schema.is_mutable:
        arguments = func._schema.arguments
        names = [argument.name for argument in arguments if argument.alias_info and argument.alias_info.is_write]
        places = [argument.name for argument in arguments if not argument.kwarg_only]
        written = [kwargs[name] if name in kwargs else args[places.index(name)] for name in names]
        return written[0] if len(written) == 1 else tuple(written)
    if goal is not None and torch.device(goal).type == "cpu":
        return made.clone() if name == "aten::_to_copy" else made
    return tree_map(lambda leaf: OnSecond(leaf) if isinstance(leaf, Tensor) else leaf, made)


def install() -> torch.library.Library:
    """Make the device known to torch, until the process ends or the library is freed."""
    _setup_privateuseone_for_python_backend()
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda op, *args, **kwargs: run_op(op, args, kwargs), "PrivateUse1")
    Original.compare = lambda *_: None  # type: ignore[method-assign]  # It needs a generator of random numbers.
    api.check_storage = lambda _: None  # It takes weights of this device for those of a library.
    make = torch.tensor  # It cannot make tensors on a device of Python.
    torch.tensor = lambda *args, device=None, **options: make(*args, **options).to(device)  # type: ignore[assignment]
    return library


class PerDevice(FakeQuant):
    """Holds codes in a form of its own on each device, in which no other device can read them."""

    name = "per-device"
    devices = frozenset({"cpu", "privateuseone"})
    moves = False
    lowered = 0

    def __init__(self, device: torch.device = CPU) -> None:
        self.device = device

    def on(self, device: torch.device) -> Backend:
        """This backend, with the form of the device."""
        return PerDevice(device)

    @property
    def mask(self) -> int:
        """What codes are held as exclusive or with."""
        return 1 if self.device.type == "cpu" else 255

    def lower(self, module: fx.GraphModule, plan: Plan, others: Mapping[str, Tensor]) -> None:
        """Hold codes in the form of the device."""
        PerDevice.lowered += 1
        rewriter = Rewriter(module, "lower to per-device")
        for node in [node for node in module.graph.nodes if str(node.target).endswith("weight_packed")]:
            users = list(node.users)
            held = derived(node, self.device.type, rewriter, others, lambda n=node: rewriter.tensor(n) ^ self.mask)
            for user in users:
                with rewriter.before(user):
                    codes = rewriter.call(torch.ops.aten.bitwise_xor.Scalar, (held, self.mask), [node])
                rewriter.redirect(user, node, codes)
        module.graph.eliminate_dead_code()
        drop_unread_tensors(module)

    def stored(self, module: fx.GraphModule) -> dict[str, Tensor]:
        """Codes in the form of checkpoints, made by this device."""
        found = read_tensors(module)
        for name in [name for name in found if name.endswith(f"weight_packed{self.device.type}")]:
            assert found[name].device.type == self.device.type
            found[name.removesuffix(self.device.type)] = found.pop(name) ^ self.mask
        return found


# --- checks ---

MODEL = make_dit()
BACKENDS = (FakeQuant, PerDevice)


def quantized(backend: type[Backend]) -> GraphModel:
    """A fresh quantized model on the CPU."""
    return copy.deepcopy(_quantized(backend))


@functools.cache
def _quantized(backend: type[Backend]) -> GraphModel:
    return fxquant.compile(
        MODEL, recipe="ptq4dit-w4a8", backend=backend(), calibrate=calibrate(MODEL, STEPS[:2]), measure=0
    )


@torch.no_grad()
def run(model: torch.nn.Module, device: torch.device = CPU, size: int = 8, timestep: float = 500.0) -> Tensor:
    """The output of one call, on the CPU."""
    given = {name: tensor.to(device) for name, tensor in inputs(size=size, timestep=timestep).items()}
    sample: Tensor = model(**given).sample
    return sample.to(CPU)


def raises(error: type[Exception], call: Any) -> str:
    """The message of the expected error."""
    try:
        call()
    except error as raised:
        return str(raised)
    raise AssertionError(f"no {error.__name__}")


def check_moves_there_and_back() -> None:
    """Each backend computes the same on both devices, also for a new size, and its codes survive."""
    for backend in BACKENDS:
        model = quantized(backend)
        expected, other, state = run(model), run(model, size=4), model.stored_tensors()
        model.to(GPU)
        assert model.device == GPU and all(tensor.device == GPU for tensor in model.tensors().values())
        torch.testing.assert_close(run(model, GPU), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(run(model, GPU, size=4), other, rtol=0, atol=1e-5)
        for name, tensor in model.stored_tensors().items():
            assert torch.equal(tensor.to(CPU), state[name]), name
        model.to("cpu")
        assert torch.equal(run(model), expected) and torch.equal(run(model, size=4), other)


def check_every_recipe() -> None:
    """A plan that was made on the CPU is carried out there, and a calibration there gives such a plan."""
    for name in ("ptq4dit", "htg", "repq", "smoothquant-search"):
        recipe = make_recipe(f"{name}-w4a8")
        ours = fxquant.compile(MODEL, recipe=recipe, calibrate=calibrate(MODEL, STEPS[:2]), measure=0)
        expected, there = run(ours), copy.deepcopy(MODEL).to(GPU)
        again = fxquant.compile(there, plan=ours.plan)
        torch.testing.assert_close(run(again, GPU), expected, rtol=0, atol=1e-4, msg=name)
        with_calls = fxquant.compile(
            there,
            recipe=recipe,
            calibrate=lambda model=there: [run(model, GPU, timestep=t) for t in STEPS[:2]],  # type: ignore[misc]
            measure=2,
        )
        assert torch.isfinite(run(with_calls, GPU)).all(), name
        assert all(tensor.device == GPU for tensor in with_calls.tensors().values()), name


def check_parks_without_lowering() -> None:
    """Between two calls on the second device, the model waits on the CPU as it is; a call there lowers it."""
    model = quantized(PerDevice)
    expected = run(model)
    model.to(GPU)
    before, codes = PerDevice.lowered, model.stored_tensors()
    for _ in range(3):
        model.to("cpu")
        assert model.device == CPU
        model.to(GPU)
        run(model, GPU)
    model.to("cpu")
    assert PerDevice.lowered == before
    stored = copy.deepcopy(model).stored_tensors()
    assert all(torch.equal(stored[name].to(CPU), codes[name].to(CPU)) for name in codes)
    assert model.device == CPU and PerDevice.lowered == before
    assert torch.equal(run(model), expected)
    assert PerDevice.lowered == before + 1


def check_an_edited_plan_is_not_lowered_again() -> None:
    """Graphs of the edited plan would read other tensors."""
    model = quantized(PerDevice)
    expected = run(model)
    assert model.plan is not None
    for layer in model.plan.layers.values():
        if layer.activation is not None:
            layer.activation = None
            layer.activation_bits = None
    assert "was edited" in raises(ConfigurationError, lambda: model.to(GPU))
    assert model.device == CPU and torch.equal(run(model), expected)


def check_a_device_without_kernels() -> None:
    """Nothing moves."""
    model = fxquant.compile(
        MODEL, recipe="rtn-w8a8", backend="native{kernels=onednn}", calibrate=calibrate(MODEL, STEPS[:2]), measure=0
    )
    expected = run(model)
    for move in (lambda: model.to(GPU), lambda: model.enable_group_offload(GPU)):
        assert "runs on cpu, cuda, not on privateuseone" in raises(BackendError, move)
        assert torch.equal(run(model), expected)


def check_group_offload() -> None:
    """Tensors come one by one; the codes stay as they are; new sizes are captured."""
    for backend in BACKENDS:
        model = quantized(backend)
        expected, other = run(model), run(quantized(backend), size=4)
        model.to(GPU)
        OnSecond.most = 0
        run(model, GPU)
        whole = OnSecond.most
        model.to("cpu")
        model.enable_group_offload(GPU, num_blocks_per_group=1)
        assert model.device == CPU
        OnSecond.most = 0
        torch.testing.assert_close(run(model), expected, rtol=0, atol=1e-5)
        held = model.get_memory_footprint() - 2 * max(tensor.nbytes for tensor in model.tensors().values())
        assert OnSecond.most < whole - held < whole, (OnSecond.most, whole, held)
        torch.testing.assert_close(run(model, GPU, size=4), other, rtol=0, atol=1e-5)
        assert not any(isinstance(tensor, OnSecond) for tensor in model.tensors().values())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.to(GPU)
        assert "is offloaded, and stays on the CPU" in str(caught[-1].message)
        torch.testing.assert_close(run(copy.deepcopy(model)), expected, rtol=0, atol=1e-5)
        model.disable_group_offload()
        assert torch.equal(run(model), expected)
        model.to(GPU)
        torch.testing.assert_close(run(model, GPU), expected, rtol=0, atol=1e-5)


def check_accelerate_offload() -> None:
    """``accelerate.cpu_offload`` streams the tensors, and removing its hooks ends that."""
    for backend in BACKENDS:
        model = quantized(backend)
        expected = run(model)
        accelerate.cpu_offload(model, GPU)
        assert model.device == CPU
        torch.testing.assert_close(run(model), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(run(model, GPU), expected, rtol=0, atol=1e-5)
        accelerate.hooks.remove_hook_from_module(model, recurse=True)
        assert torch.equal(run(model), expected)
        assert [*model._modules] == ["graphs"]


def image(pipe: diffusers.DiTPipeline) -> Tensor:
    """An image of a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    made = pipe(class_labels=[1], num_inference_steps=2, generator=generator, output_type="np")
    return torch.from_numpy(made.images)


def check_pipelines() -> None:
    """A pipeline is moved and offloaded in every way; the images stay the same."""
    for backend in BACKENDS:
        pipe = make_pipeline(quantized(backend))
        pipe._exclude_from_cpu_offload = ["vae"]  # accelerate cannot make parameters of this device again.
        expected = image(pipe)
        ways: tuple[Callable[..., Any], ...] = (
            pipe.to,
            pipe.enable_model_cpu_offload,
            pipe.enable_sequential_cpu_offload,
            pipe.enable_model_cpu_offload,
        )
        for way in ways:
            way(device=GPU)
            for _ in range(2):
                torch.testing.assert_close(image(pipe), expected, rtol=0, atol=1e-4)
            pipe.remove_all_hooks()
            pipe.to("cpu")
            torch.testing.assert_close(image(pipe), expected, rtol=0, atol=1e-4)
        pipe.enable_group_offload(onload_device=GPU, offload_type="leaf_level", exclude_modules="vae")
        for _ in range(2):
            torch.testing.assert_close(image(pipe), expected, rtol=0, atol=1e-4)


def check_vaes() -> None:
    """A VAE moves with its quantized parts, and is offloaded with them."""
    torch.manual_seed(0)
    blocks = {"encoder_block_out_channels": (8,), "decoder_block_out_channels": (8,)}
    vae = diffusers.AutoencoderTiny(**blocks, num_encoder_blocks=(1,), num_decoder_blocks=(1,)).eval()
    given = torch.rand(1, 3, 8, 8)

    @torch.no_grad()
    def made(model: Any, device: torch.device = CPU) -> Tensor:
        sample: Tensor = model(given.to(device)).sample
        return sample.to(CPU)

    for backend in BACKENDS:
        model = fxquant.compile_parts(vae, recipe="rtn-w8a8", backend=backend(), calibrate=lambda: made(vae), measure=0)
        expected = made(model)
        model.to(GPU)
        assert model.decoder.device == model.encoder.device == GPU
        torch.testing.assert_close(made(model, GPU), expected, rtol=0, atol=1e-5)
        model.to("cpu")
        torch.testing.assert_close(made(model), expected, rtol=0, atol=1e-5)
        for _ in range(2):
            accelerate.cpu_offload(model, GPU)
            assert model.decoder.device == CPU and model.decoder.runs_on == GPU
            torch.testing.assert_close(made(model, GPU), expected, rtol=0, atol=1e-5)
            accelerate.hooks.remove_hook_from_module(model, recurse=True)
            torch.testing.assert_close(made(model), expected, rtol=0, atol=1e-5)
    with_no_kernels = copy.deepcopy(model)
    with_no_kernels.decoder.backend = OnlyCpu()
    message = raises(BackendError, lambda: with_no_kernels.to(GPU))
    assert "only-cpu" in message, message
    assert with_no_kernels.encoder.device == CPU, "nothing was moved"


class OnlyCpu(FakeQuant):
    """Has no kernels for the second device."""

    name = "only-cpu"
    devices = frozenset({"cpu"})


def check_loras() -> None:
    """LoRAs move with the model, and are loaded, weighed, switched and swapped wherever it is."""
    first, second = lora(MODEL), lora(MODEL, rank=2, seed=1, targets=("norm1.linear", "to_q"))
    for backend in BACKENDS:
        model = quantized(backend)
        plain = run(model)
        model.load_lora_adapter(first, adapter_name="a")
        expected, other = run(model), run(model, size=4)
        assert not torch.allclose(expected, plain, atol=1e-2)
        model.to(GPU)
        torch.testing.assert_close(run(model, GPU), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(run(model, GPU, size=4), other, rtol=0, atol=1e-5)
        model.set_adapters("a", 0.5)
        assert not torch.allclose(run(model, GPU), expected, atol=1e-3)
        model.disable_lora()
        torch.testing.assert_close(run(model, GPU), plain, rtol=0, atol=1e-5)
        model.enable_lora()
        model.to("cpu")  # Parked.
        model.load_lora_adapter(second, adapter_name="b")
        assert model.device == CPU and all(tensor.device == CPU for tensor in held(model))
        model.to(GPU)
        model.set_adapters("b")
        swapped = run(model, GPU)
        model.set_adapters("a")
        torch.testing.assert_close(run(model, GPU), expected, rtol=0, atol=1e-5)
        model.to("cpu")
        torch.testing.assert_close(run(model), expected, rtol=0, atol=1e-5)
        model.delete_adapters("b")
        model.enable_group_offload(GPU)
        torch.testing.assert_close(run(model), expected, rtol=0, atol=1e-5)
        model.load_lora_adapter(second, adapter_name="c")  # While it is offloaded.
        model.set_adapters(["a", "c"], [0.0, 1.0])
        torch.testing.assert_close(run(model), swapped, rtol=0, atol=1e-5)
        model.delete_adapters("c")
        model.load_lora_adapter(second, adapter_name="a", hotswap=True)
        torch.testing.assert_close(run(model), swapped, rtol=0, atol=1e-5)
        assert all(tensor.device == CPU for tensor in held(model))
        model.disable_group_offload()
        torch.testing.assert_close(run(model), swapped, rtol=0, atol=1e-5)
        model.unload_lora()
        torch.testing.assert_close(run(model), plain, rtol=0, atol=1e-5)


def check_parked_with_loras() -> None:
    """A call of a parked model lowers the graphs with branches of LoRAs for the device where they are."""
    model = quantized(PerDevice)
    model.to(GPU)
    model.load_lora_adapter(lora(MODEL), adapter_name="a")
    expected = run(model, GPU)
    model.to("cpu")
    torch.testing.assert_close(run(model), expected, rtol=0, atol=1e-5)
    assert all(tensor.device == CPU for tensor in held(model))


def check_text_encoders() -> None:
    """One that was quantized there is saved and read here: attentions of the devices return other layouts."""
    encoder = make_t5().to(GPU)
    tokens = torch.arange(8)[None]

    def embed(model: Any, device: torch.device = CPU) -> Tensor:
        embeddings: Tensor = model(tokens.to(device)).last_hidden_state.cpu()
        return embeddings

    made = fxquant.compile(encoder, recipe="rtn-w8a16", calibrate=lambda: embed(encoder, GPU), timestep=None, measure=0)
    expected = embed(made, GPU)
    made.to("cpu")
    torch.testing.assert_close(embed(made), expected, rtol=0, atol=1e-5)
    with tempfile.TemporaryDirectory() as folder:
        made.save_pretrained(folder)
        torch.testing.assert_close(embed(fxquant.load(folder)), expected, rtol=0, atol=1e-5)
    made.to(GPU, torch.bfloat16)
    torch.testing.assert_close(embed(made, GPU).float(), expected, rtol=0, atol=0.05)


def held(model: GraphModel) -> list[Tensor]:
    """The tensors of all graphs, those of LoRAs included."""
    return [tensor for captured in model.every for tensor in read_tensors(captured.module).values()]


def main(names: list[str]) -> None:
    """Run checks and print the outcome of each."""
    library = install()
    outcomes: dict[str, str | None] = {}
    with traced_once(), memos(known_memos), worked_out_once(), rebuilt_once():
        for name in names:
            try:
                globals()[f"check_{name}"]()
                outcomes[name] = None
            except Exception:
                outcomes[name] = traceback.format_exc()
    print(json.dumps(outcomes))
    del library


if __name__ == "__main__":
    main(sys.argv[1:])
