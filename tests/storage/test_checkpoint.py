"""Checkpoints: the same bits in a new process, nothing in float, and every kind of damage refused by name."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
import random
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fxquant
from fxquant.disk import files
from fxquant.errors import (
    AlreadyCompiledError,
    BackendError,
    CheckpointError,
    ConfigurationError,
    NonFiniteError,
    QualityWarning,
    UnknownNameError,
    WriteError,
)
from fxquant.planning.plan import FORMAT
from fxquant.runtime.model import GraphModel
from fxquant.storage import skeleton
from tests.tiny import calibrate, inputs, make_dit, run
from tests.traces import traced_anew

FILES = ("config.json", "plan.json", "diffusion_pytorch_model.safetensors", "plan.safetensors")


@pytest.fixture(scope="module")
def quantized() -> GraphModel:
    model = make_dit()
    return fxquant.compile(model, recipe="ptq4dit-w4a8", calibrate=calibrate(model))


@pytest.fixture(scope="module")
def saved(quantized: GraphModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "dit-w4a8"
    fxquant.save(quantized, folder)
    return folder


@pytest.fixture(scope="module")
def most_seconds(saved: Path) -> float:
    """What a refusal may take: 5 s, or on slow processors four times what it takes to load."""
    with traced_anew():
        fxquant.load(saved)  # The first time imports what it needs.
        began = time.process_time()
        fxquant.load(saved)
    return max(5.0, 4 * (time.process_time() - began))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def sign(folder: Path, change: Callable[[dict[str, Any]], object] = lambda data: None) -> None:
    """Bring all digests up to date, as someone would who forges a checkpoint."""
    data = json.loads((folder / "plan.json").read_text())
    data["files"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in data["files"]}
    change(data)
    data.pop("digest", None)
    data["digest"] = files.digest_of(data)
    (folder / "plan.json").write_text(json.dumps(data, indent=1) + "\n")


def forge(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Write other tensors with correct digests."""
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    sign(folder)


# --- what is written ---

_OTHER_PROCESS = """
import sys, torch, fxquant
from tests.tiny import run
model = fxquant.load(sys.argv[1])
torch.save([run(model, timestep=None), run(model, batch=1)], sys.argv[2])
"""


@pytest.mark.exhaustive  # ``make test`` does so in tests/pretrained/test_from_pretrained.py and for docs/lives.md.
def test_a_new_process_gives_the_same_bits(quantized: GraphModel, saved: Path, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", _OTHER_PROCESS, saved, tmp_path / "out.pt"], check=True, cwd=root)
    several, one = torch.load(tmp_path / "out.pt")
    assert torch.equal(several, run(quantized, timestep=None))
    assert torch.equal(one, run(quantized, batch=1))


def test_what_a_loaded_model_is(quantized: GraphModel, saved: Path) -> None:
    loaded = fxquant.load(saved)
    assert loaded.plan.to_json() == quantized.plan.to_json()
    assert loaded.plan.vectors.keys() == quantized.plan.vectors.keys()
    assert all(torch.equal(loaded.plan.vectors[name], vector) for name, vector in quantized.plan.vectors.items())
    assert dict(loaded.config) == dict(quantized.config)
    assert (loaded.dtype, loaded.device, loaded.training) == (torch.float32, torch.device("cpu"), False)
    ours, theirs = loaded.tensors(), quantized.tensors()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)


def test_saving_what_was_loaded_writes_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    fxquant.save(fxquant.load(saved), tmp_path / "again")
    assert contents(tmp_path / "again") == contents(saved)


def test_only_these_files(saved: Path) -> None:
    assert sorted(contents(saved)) == sorted((*FILES, "README.md"))


def test_no_float_weights(quantized: GraphModel, saved: Path) -> None:
    tensors = load_file(saved / "diffusion_pytorch_model.safetensors")
    layers = {name.partition("@")[0]: layer for name, layer in quantized.plan.quantized()}
    assert len(layers) >= 8
    for name, layer in layers.items():
        assert f"{name}.weight" not in tensors
        assert tensors[f"{name}.weight_packed"].dtype == torch.uint8
        for key, tensor in tensors.items():
            if key.startswith(f"{name}.") and tensor.is_floating_point():
                assert tensor.numel() < layer.shape[0] * layer.shape[1], key
    weights = {
        f"{name}.weight": module.weight for name, module in make_dit().named_modules() if hasattr(module, "weight")
    }
    for name in layers:  # Under no other name either.
        shape = weights[f"{name}.weight"].shape
        assert not any(t.is_floating_point() and t.shape in (shape, shape[::-1]) for t in tensors.values()), name


class RealTensors(TorchDispatchMode):
    """Notes the shape of every float tensor with values that any op makes."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            real = isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor) and not leaf.is_meta
            if real and leaf.is_floating_point():
                self.shapes.add(tuple(leaf.shape))
        return result


def test_load_makes_no_float_weights(quantized: GraphModel, saved: Path) -> None:
    shapes = {tuple(layer.shape) for _, layer in quantized.plan.quantized()}
    with RealTensors() as seen:
        make_dit()
    assert shapes <= seen.shapes  # The watch sees float weights where they are made.
    with RealTensors() as seen, traced_anew():
        fxquant.load(saved)
    assert not shapes & seen.shapes


class Mixed(nn.Module):
    """A model that keeps its embedder in float32, as many of diffusers do."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.config = {"width": width}
        self.embed = nn.Linear(1, width)
        self.proj = nn.Linear(width, width)
        self.register_buffer("position", torch.arange(width) / width)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Mixed:
        return cls(**config)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        embedded = self.embed(timestep[:, None].to(self.embed.weight.dtype)) + self.position
        return self.proj(x + embedded.to(x.dtype))


@pytest.mark.parametrize("kept", [False, True], ids=["all in bfloat16", "some kept in float32"])
def test_dtypes_other_than_those_of_the_class(tmp_path: Path, kept: bool) -> None:
    model = Mixed().eval().to(torch.bfloat16)
    if kept:
        model.embed.float()
        model.position = model.position.float() + 1e-4
    x, timestep = torch.randn(2, 8).bfloat16(), torch.tensor([1.0, 9.0])
    quantized = fxquant.compile(model, recipe="rtn-w8a8", layers="all", calibrate=lambda: model(x, timestep))
    fxquant.save(quantized, tmp_path / "mixed")
    for given in (Mixed, Mixed().eval()):
        loaded = fxquant.load(tmp_path / "mixed", model=given)
        assert loaded.dtype == quantized.dtype
        assert torch.equal(loaded(x, timestep), quantized(x, timestep))


def test_a_bfloat16_dit(tmp_path: Path) -> None:
    model = make_dit().to(torch.bfloat16)
    arguments = inputs(timestep=None) | {"hidden_states": inputs()["hidden_states"].bfloat16()}
    with torch.no_grad():
        quantized = fxquant.compile(model, recipe="smoothquant-w8a8", calibrate=lambda: model(**arguments))
        fxquant.save(quantized, tmp_path / "bf16")
        loaded = fxquant.load(tmp_path / "bf16")
        assert loaded.dtype == quantized.dtype == torch.bfloat16
        assert loaded(**arguments).sample.dtype == torch.bfloat16
        assert torch.equal(loaded(**arguments).sample, quantized(**arguments).sample)


# --- damage ---


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte(folder: Path, name: str) -> None:
    whole = (folder / name).read_bytes()
    random.seed(name)
    for _ in range(25):
        position, mask = random.randrange(len(whole)), random.randrange(1, 256)
        damaged = bytearray(whole)
        damaged[position] ^= mask
        (folder / name).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            fxquant.load(folder)


def test_white_space_in_the_plan(folder: Path) -> None:
    text = (folder / "plan.json").read_text()
    (folder / "plan.json").write_text(text.replace("\n ", "\n\t", 1))
    with pytest.raises(CheckpointError, match=r"plan\.json"):
        fxquant.load(folder)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file(folder: Path, name: str, share: float) -> None:
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        fxquant.load(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.") + " is missing"):
        fxquant.load(folder)
    if name != "plan.json":  # Nor when the plan does not speak of it.
        data = json.loads((folder / "plan.json").read_text())
        del data["files"][name], data["digest"]
        data["digest"] = files.digest_of(data)
        (folder / "plan.json").write_text(json.dumps(data, indent=1) + "\n")
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            fxquant.load(folder)


def test_no_folder_and_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no folder"):
        fxquant.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="not an fxquant checkpoint"):
        fxquant.load(tmp_path)


TO_Q = "transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{TO_Q}.weight_packed"), (f"{TO_Q}.weight_packed", "no tensor")),
        (lambda t: t.pop(f"{TO_Q}.bias"), (f"{TO_Q}.bias", "no tensor")),
        (lambda t: t.update({f"{TO_Q}.bias": torch.zeros(17)}), (f"{TO_Q}.bias", "(17,)", "(16,)")),
        (
            lambda t: t.update({f"{TO_Q}.bias": t[f"{TO_Q}.bias"].half()}),
            (f"{TO_Q}.bias", "torch.float16", "torch.float32"),
        ),
        (lambda t: t.update(extra=torch.zeros(1)), ("extra", "reads no tensor")),
        (lambda t: t.update(renamed=t.pop(f"{TO_Q}.bias")), (f"{TO_Q}.bias",)),
        (lambda t: t.clear(), ("no tensor",)),
    ],
    ids=["no codes", "no bias", "another shape", "another dtype", "extra", "renamed", "none"],
)
def test_tensors_that_do_not_belong(folder: Path, change: Callable[[Any], object], said: tuple[str, ...]) -> None:
    forge(folder, change)
    with pytest.raises(CheckpointError) as caught:
        fxquant.load(folder)
    assert all(words in str(caught.value) for words in ("diffusion_pytorch_model.safetensors", *said)), str(
        caught.value
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(dtype="load"),
        lambda d: d.pop("dtype"),
        lambda d: d.pop("layers"),
        lambda d: d.update(layers=[]),
        lambda d: d["layers"][TO_Q].update(weight_bits=99),
        lambda d: d["layers"][TO_Q].update(weight_bits="4"),
        lambda d: d["layers"][TO_Q].pop("kind"),
        lambda d: d["layers"].pop(TO_Q),
        lambda d: d.update(calls=[]),
        lambda d: d["calls"][0].update(leaves=[]),
        lambda d: d.update(recipe="rm -rf"),
        lambda d: d.update(recipe=4),
        lambda d: d.update(files=[]),
        lambda d: d.update(model_class="diffusers:DiTPipeline"),
        lambda d: d.update(model_class="diffusers:utils"),
        lambda d: d.update(model_class="diffusers:NoSuchModel"),
        lambda d: d.update(model_class=3),
    ],
)
def test_a_plan_that_makes_no_sense(folder: Path, change: Callable[[Any], object]) -> None:
    sign(folder, change)
    with pytest.raises(CheckpointError, match=r"plan\.json|diffusers"):
        fxquant.load(folder)


def test_a_config_that_makes_no_sense(folder: Path) -> None:
    for text in ("[]", "{", '{"num_layers": "two"}'):
        (folder / "config.json").write_text(text)
        sign(folder)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            fxquant.load(folder)


@pytest.mark.parametrize("number", [FORMAT + 1, 99, "one", None, 1.5])
def test_another_format(folder: Path, number: Any) -> None:
    sign(folder, lambda data: data.update(format=number))
    with pytest.raises(CheckpointError, match=r"plan\.json.*format") as caught:
        fxquant.load(folder)
    if number == FORMAT + 1:
        assert "install a newer fxquant" in str(caught.value)


# --- files that contradict each other, or hold what compiling never makes ---


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
@pytest.mark.parametrize("name", [f"{TO_Q}.weight_scale", f"{TO_Q}.input_scale"])
def test_scales_that_are_none(folder: Path, name: str, value: float) -> None:
    forge(folder, lambda tensors: tensors[name].view(-1)[:1].fill_(value))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor '{re.escape(name)}' holds"):
        fxquant.load(folder)


@pytest.mark.parametrize("name", [f"{TO_Q}.bias", "pos_embed.pos_embed"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tensors_that_are_not_finite(folder: Path, name: str, value: float) -> None:
    forge(folder, lambda tensors: tensors[name].view(-1)[:1].fill_(value))
    with pytest.raises(CheckpointError, match=rf"tensor '{re.escape(name)}' holds (NaN|infinity)"):
        fxquant.load(folder)


def test_zero_points_that_are_no_codes(folder: Path) -> None:
    forge(folder, lambda tensors: tensors[f"{TO_Q}.weight_zero_point"].view(-1)[:1].fill_(16))
    with pytest.raises(CheckpointError, match=r"weight_zero_point' holds zero points outside of the codes 0 to 15"):
        fxquant.load(folder)


def test_vectors_that_are_not_finite(folder: Path) -> None:
    vectors = load_file(folder / "plan.safetensors")
    next(iter(vectors.values())).view(-1)[:1].fill_(float("nan"))
    save_file(vectors, folder / "plan.safetensors")
    sign(folder)
    with pytest.raises(CheckpointError, match=r"plan\.safetensors: vector .* finite"):
        fxquant.load(folder)


def test_ranges_that_are_not_those_of_the_tensors(folder: Path) -> None:
    def widen(data: dict[str, Any]) -> None:
        data["layers"][TO_Q]["activation"]["high"] += 1.0

    sign(folder, widen)
    with pytest.raises(CheckpointError, match=r"plan\.json: the model .* computes something else"):
        fxquant.load(folder)  # Layers that read one value share a range, and now they do not.

    def widen_all(data: dict[str, Any]) -> None:
        for layer in data["layers"].values():
            if layer["activation"]:
                layer["activation"]["high"] = 9.0

    sign(folder, widen_all)
    with pytest.raises(CheckpointError, match=r"'.*input_(scale|zero_point)' is not what follows from the plan"):
        fxquant.load(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d["layers"][TO_Q].update(weight_bits=True), "'weight_bits': input should be a valid integer"),
        (lambda d: d["layers"][TO_Q]["activation"].update(low=float("nan")), "'low': input should be a finite number"),
        (lambda d: d["layers"][TO_Q]["activation"].update(low=9e9), "low should not be above high"),
        (lambda d: d["layers"][TO_Q]["activation"].update(low=[0.0], high=[1.0, 2.0]), "as many numbers"),
        (lambda d: d["layers"][TO_Q].update(timesteps={"boundaries": [2.0, 1.0]}), "ascending order"),
        (lambda d: d.update(timesteps=[float("nan")]), "'timesteps' > 0: input should be a finite number"),
        (lambda d: d.update(timesteps=[3.0, 1.0]), "ascending order"),
        (lambda d: d.update(timestep="time"), "'time' is not an input of the recorded calls"),
        (lambda d: d.update(timestep=None), "None is not an input of the recorded calls"),
        (lambda d: d.update(backend="tensorrt"), "unknown backend 'tensorrt'"),
        (lambda d: d.update(dtype="int8"), "'dtype': this is not a floating-point dtype"),
        (lambda d: d.update(dtype="float64"), "cannot be traced|the model needs torch.float64"),
        (lambda d: d["calls"][0]["leaves"][0].update(dtype="float"), "another"),
        (lambda d: d["calls"][0]["leaves"][0].update(dtype="load"), "'dtype': torch has no dtype of this name"),
        (lambda d: d["calls"][0]["leaves"][0].update(shape=[-1]), "'shape' > 0"),
        (lambda d: d["calls"].append(d["calls"][0]), "two of the recorded calls are the same"),
        (lambda d: d["calls"].extend(20 * [d["calls"][0]]), "two of the recorded calls are the same"),
        (lambda d: d["layers"][TO_Q].update(timesteps={"boundaries": [0.5] * 200_000}), "at most 10000 items"),
        (lambda d: d.update(recipe=d["recipe"] + ",remove-no-ops" * 50_000), "at most 20000 characters"),
        (lambda d: d.update(passes=d["passes"] * 500), "at most 200 items"),
        (lambda d: d["layers"].update({"x" * 100_000: d["layers"][TO_Q]}), "at most 500 characters"),
        (lambda d: d["layers"].update({"\x1b[2J": d["layers"][TO_Q]}), "characters that cannot be printed"),
        (lambda d: d["layers"][TO_Q].update(activation_bits=7), "is not what follows from the plan|something else"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_that_no_plan_has(folder: Path, change: Callable[[Any], object], said: str) -> None:
    sign(folder, change)
    if said == "another":  # torch.float is float32.
        fxquant.load(folder)
        return
    with pytest.raises(CheckpointError, match=said) as caught:
        fxquant.load(folder)
    assert "plan.json" in str(caught.value) or "diffusion_pytorch_model.safetensors" in str(caught.value)
    assert "calibrate" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"attention_head_dim": 40_000_000, "num_layers": 10**9}, "holds the number"),
        ({"num_layers": 10_000_000}, "far larger than the tensors"),
        ({"attention_head_dim": 10_000_000}, "far larger than the tensors"),
        ({"num_layers": 28}, "runs more than .* layers, far more than were quantized"),
        ({"attention_head_dim": 16}, "is 96 x 16|is .* x .*, and in the plan"),
        ({"norm_eps": float("nan")}, "computes something else"),
        ({"norm_eps": 0.5}, "computes something else"),
        ({"activation_fn": "gelu"}, "computes something else"),
        ({"nested": 100 * [None]}, ""),
    ],
    ids=str,
)
def test_configs_that_are_not_the_models(folder: Path, most_seconds: float, change: dict[str, Any], said: str) -> None:
    config = json.loads((folder / "config.json").read_text()) | change
    del config["_use_default_values"]  # In place of which from_config takes defaults.
    (folder / "config.json").write_text(json.dumps(config))
    sign(folder)
    began = time.process_time()
    if not said:
        fxquant.load(folder)
        return
    with pytest.raises(CheckpointError, match=said) as caught:
        fxquant.load(folder)
    assert "config.json" in str(caught.value) or "plan.json" in str(caught.value)
    assert time.process_time() - began < most_seconds


def test_a_config_that_is_nested_too_deeply(folder: Path) -> None:
    (folder / "config.json").write_text('{"a": ' + "[" * 100 + "]" * 100 + "}")
    sign(folder)
    with pytest.raises(CheckpointError, match=r"config\.json.*levels deep"):
        fxquant.load(folder)


def test_a_layer_that_the_plan_does_not_know(folder: Path) -> None:
    sign(folder, lambda data: data["layers"].pop(TO_Q))
    with pytest.raises(
        CheckpointError, match=rf"plan\.json: .*the plan knows no layer '{TO_Q}'.*another model"
    ) as caught:
        fxquant.load(folder)
    assert "calibrate" not in str(caught.value)
    with pytest.raises(CheckpointError, match="another model") as caught:
        fxquant.load(folder, model=make_dit())
    assert "calibrate" not in str(caught.value)


@pytest.mark.parametrize("further", [0, 1, 2])
def test_codes_of_another_size_than_the_plan_says_are_found_before_the_model_is_built(
    folder: Path, further: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where tensors are numbered, as they are where a model has one of that name itself."""
    name = f"{TO_Q}.weight_packed"
    names = [name, *(f"{name}_{number + 2}" for number in range(further))]
    forge(folder, lambda tensors: tensors.update({name: torch.zeros(3, 5, dtype=torch.uint8) for name in names}))
    monkeypatch.setattr(skeleton, "_architecture", None)
    with pytest.raises(CheckpointError, match=rf"tensor '{names[-1]}' has shape \(3, 5\), and by the plan it has"):
        fxquant.load(folder)


def test_a_range_that_the_plan_does_not_hold(folder: Path) -> None:
    sign(folder, lambda data: data["layers"][TO_Q].update(activation=None))
    with pytest.raises(CheckpointError, match=r"plan\.json: the plan does not hold what was decided") as caught:
        fxquant.load(folder)
    assert "calibrate" not in str(caught.value)


def test_a_model_whose_code_has_changed(folder: Path) -> None:
    def older(data: dict[str, Any]) -> None:
        data["made_with"] = {"torch": "2.0", "diffusers": "0.1"}
        data["digests"] = ["0"]

    sign(folder, older)
    with pytest.warns(QualityWarning, match=r"computes something else.*diffusers 0\.1"):
        fxquant.load(folder)
    for key in ("made_with", "digests", "infinite"):  # As checkpoints were before.
        sign(folder, lambda data, key=key: data.pop(key))
    fxquant.load(folder)


class Bomb:
    exploded = False

    def __reduce__(self) -> Any:
        return (setattr, (Bomb, "exploded", True))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt", "extra.PKL"])
def test_a_pickle_in_the_folder(folder: Path, name: str) -> None:
    (folder / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match=f"{name} is a pickle.*Remove it"):
        fxquant.load(folder)


@pytest.mark.parametrize("disguise", ["pickle", "zip"])
def test_a_pickle_that_says_it_is_safetensors(folder: Path, disguise: str) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    if disguise == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        fxquant.load(folder)
    sign(folder)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read as safetensors"):
        fxquant.load(folder)
    assert not Bomb.exploded


def test_an_unknown_backend(saved: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"Known:.*fake-quant"):
        fxquant.load(saved, backend="tensorrt")


# --- models that are not from diffusers ---


class Custom(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.config = {"width": width}
        self.proj = nn.Linear(width, width)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Custom:
        return cls(**config)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.proj(x) + timestep[:, None]


def test_a_class_of_ones_own(tmp_path: Path) -> None:
    model = Custom().eval()
    x, timestep = torch.randn(2, 8), torch.tensor([1.0, 9.0])
    quantized = fxquant.compile(model, recipe="rtn-w8a8", layers="all", calibrate=lambda: model(x, timestep))
    fxquant.save(quantized, tmp_path / "custom")
    with pytest.raises(
        CheckpointError, match=r"holds a Custom from .*test_checkpoint, .*fxquant\.load\(folder, model="
    ):
        fxquant.load(tmp_path / "custom")
    for given in (Custom, Custom().eval()):
        assert torch.equal(fxquant.load(tmp_path / "custom", model=given)(x, timestep), quantized(x, timestep))
    with pytest.raises(CheckpointError, match="proj"):
        fxquant.load(tmp_path / "custom", model=Custom(16).eval())
    with pytest.raises(ConfigurationError, match="class with from_config"):
        fxquant.load(tmp_path / "custom", model=nn.Linear)


class Masked(Custom):
    """A mask of minus infinity is meant."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.register_buffer("mask", torch.where(torch.arange(width) < 2, 0.0, -torch.inf))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return torch.softmax(self.proj(x) + self.mask, dim=-1) + timestep[:, None]


def test_a_nan_that_could_not_be_read_is_not_written(quantized: GraphModel, tmp_path: Path) -> None:
    model = copy.deepcopy(quantized)
    with torch.no_grad():
        model.tensors()["pos_embed.pos_embed"].view(-1)[0] = torch.nan
    with pytest.raises(CheckpointError, match=r"tensor 'pos_embed\.pos_embed' holds NaN"):
        fxquant.save(model, tmp_path / "q")
    assert not list(tmp_path.iterdir())


def test_infinity_that_is_meant(tmp_path: Path) -> None:
    model = Masked().eval()
    x, timestep = torch.randn(2, 8), torch.tensor([1.0, 9.0])
    quantized = fxquant.compile(model, recipe="rtn-w8a8", layers="all", calibrate=lambda: model(x, timestep))
    fxquant.save(quantized, tmp_path / "masked")
    assert torch.equal(fxquant.load(tmp_path / "masked", model=Masked)(x, timestep), quantized(x, timestep))


# --- where it is written ---


def test_a_folder_that_exists(quantized: GraphModel, folder: Path) -> None:
    before = contents(folder)
    with pytest.raises(CheckpointError, match=r"copy exists.*overwrite=True"):
        fxquant.save(quantized, folder)
    assert contents(folder) == before
    (folder / "config.json").write_text("{}")
    fxquant.save(quantized, folder, overwrite=True)
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_an_empty_folder_and_missing_parents(quantized: GraphModel, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        fxquant.save(quantized, target)
        assert contents(target) == contents(saved)


def test_overwrite_spares_what_is_no_checkpoint(quantized: GraphModel, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("years of it")
    with pytest.raises(CheckpointError, match=r"thesis\.tex.*choose another folder"):
        fxquant.save(quantized, tmp_path / "work", overwrite=True)
    assert contents(tmp_path / "work") == {"thesis.tex": b"years of it"}
    with pytest.raises(CheckpointError, match="is a file"):
        fxquant.save(quantized, tmp_path / "work" / "thesis.tex", overwrite=True)


FULL = [OSError("no space left on device"), SafetensorError("IoError: no space left on device")]


@pytest.mark.parametrize("error", FULL, ids=["system", "safetensors"])
def test_a_failing_save_leaves_all_as_it_was(
    quantized: GraphModel, folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    before = contents(folder)
    monkeypatch.setattr(files, "save_file", full)
    for target in (folder, folder.parent / "new"):
        with pytest.raises(WriteError, match=f"{target} cannot be written: .*no space left on device"):
            fxquant.save(quantized, target, overwrite=True)
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_everybody_may_read_what_new_files_let_them_read(quantized: GraphModel, tmp_path: Path) -> None:
    fxquant.save(quantized, tmp_path / "q")
    (tmp_path / "plain").touch()
    modes = {path.stat().st_mode for path in (*(tmp_path / "q").iterdir(), tmp_path / "plain")}
    assert len(modes) == 1
    quantized.plan.save(tmp_path / "plan")
    assert {path.stat().st_mode for path in (tmp_path / "plan").iterdir()} == modes


def test_a_float_model_of_others_is_not_replaced(quantized: GraphModel, saved: Path, tmp_path: Path) -> None:
    """Transformers name their files as checkpoints do."""
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (tmp_path / name).write_text("precious")
    with pytest.raises(CheckpointError, match=r"no plan\.json, so fxquant did not write it"):
        fxquant.save(quantized, tmp_path, overwrite=True)
    assert contents(tmp_path) == {"config.json": b"precious", "diffusion_pytorch_model.safetensors": b"precious"}


def test_folders_and_links_of_our_names_are_not_replaced(quantized: GraphModel, folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").rename(tmp_path / "config.json")
    (folder / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"more than a checkpoint \(config\.json\)"):
        fxquant.save(quantized, folder, overwrite=True)
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"more than a checkpoint \(config\.json\)"):
        fxquant.save(quantized, folder, overwrite=True)


def test_what_an_interrupted_save_left_is_named(folder: Path) -> None:
    aside = folder.rename(folder.parent / f".{folder.name}.replaced-0123abcd")
    with pytest.raises(CheckpointError, match=f"a save was interrupted.* is in {aside}"):
        fxquant.load(folder)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    for thing in (make_dit(), fxquant.trace(make_dit())):
        with pytest.raises(ConfigurationError, match=r"save takes a model that fxquant\.compile made"):
            fxquant.save(thing, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_save_pretrained_and_overwriting_through_a_link(quantized: GraphModel, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    quantized.save_pretrained(tmp_path / "link", safe_serialization=True)
    quantized.save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "real") == contents(saved)


def test_another_backend_and_device(quantized: GraphModel, saved: Path) -> None:
    loaded = fxquant.load(saved, backend="fake-quant", device=torch.device("cpu"))
    assert loaded.plan.backend == "fake-quant"
    assert torch.equal(run(loaded), run(quantized))


def test_formats_that_the_device_lacks_are_refused_with_two_ways_out(tmp_path: Path) -> None:
    """As a checkpoint that `native` wrote on a GPU with products of 8-bit floats."""
    model = make_dit()
    made = fxquant.compile(model, recipe="rtn-wfp8afp8", calibrate=calibrate(model), measure=0)
    assert made.plan is not None
    made.plan.backend = "native"
    fxquant.save(made, tmp_path / "fp8")
    with pytest.raises(BackendError) as caught:
        fxquant.load(tmp_path / "fp8")
    message = str(caught.value)
    assert "7 layers (transformer_blocks.0.norm1.linear, transformer_blocks.0.attn1.to_q, " in message
    assert "has the format fp8" in message
    assert f"fxquant.load({str(tmp_path / 'fp8')!r}, backend='fake-quant')" in message
    assert "a device that has their products (device='cuda')" in message
    loaded = fxquant.load(tmp_path / "fp8", backend="fake-quant")
    assert torch.equal(run(loaded), run(made))


def test_no_escape_of_a_plan_reaches_the_terminal(folder: Path) -> None:
    sign(folder, lambda data: data.update(needs_model="\x1b[31mred"))
    with pytest.raises(CheckpointError, match="do not give it: ") as caught:
        fxquant.load(folder)
    assert str(caught.value).isprintable()


def test_a_plan_does_not_take_the_place_of_a_checkpoints(quantized: GraphModel, folder: Path, tmp_path: Path) -> None:
    before = contents(folder)
    with pytest.raises(CheckpointError, match="holds a checkpoint, which another plan would make useless"):
        quantized.plan.save(folder)
    assert contents(folder) == before
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="file cannot be written: "):
        quantized.plan.save(tmp_path / "file")
    for _ in range(2):
        quantized.plan.save(tmp_path / "plan")


def test_a_model_to_load_into_that_is_no_float_model(quantized: GraphModel, folder: Path) -> None:
    with pytest.raises(AlreadyCompiledError, match="made by fxquant; give the original float model"):
        fxquant.load(folder, model=quantized)
    with pytest.raises(ConfigurationError, match=r"this model went through torch\.compile"):
        fxquant.load(folder, model=torch.compile(make_dit()))


@pytest.mark.parametrize("name", ["proj_out_2.weight", f"{TO_Q}.bias"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_plan_carried_out_on_weights_that_are_not_finite(quantized: GraphModel, name: str, value: float) -> None:
    """A checkpoint of it could not be read."""
    model = make_dit()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = value
    with pytest.raises(NonFiniteError, match=f"weight '{name}' of the model"):
        fxquant.compile(model, plan=quantized.plan)
