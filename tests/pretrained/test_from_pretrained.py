"""What ``from_pretrained`` of diffusers does with FxQuantConfig, and with what fxquant wrote."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from accelerate.hooks import CpuOffload, add_hook_to_module
from diffusers import DDIMScheduler, DiffusionPipeline, DiTTransformer2DModel, PipelineQuantizationConfig
from torch import nn

import fxquant
from fxquant.errors import CalibrationError, CheckpointError, ConfigurationError, HubError, UnknownNameError
from fxquant.pretrained.parts import PipelineModel
from fxquant.runtime.model import GraphModel
from tests.tiny import calibrate, make_dit, make_pipeline, run

ROOT = Path(__file__).parents[2]
read = DiTTransformer2DModel.from_pretrained


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float pipeline."""
    folder = tmp_path_factory.mktemp("float") / "pipeline"
    make_pipeline(make_dit()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantized() -> GraphModel:
    model = make_dit()
    return fxquant.compile(model, recipe="rtn-w4a16", calibrate=lambda: run(model))


@pytest.fixture(scope="module")
def pipelines(quantized: GraphModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a quantized pipeline as fxquant writes it, as diffusers writes it, and with a sharded part."""
    folder = tmp_path_factory.mktemp("quantized")
    pipe = make_pipeline(quantized)
    fxquant.save_pipeline(pipe, folder / "ours")
    pipe.save_pretrained(folder / "theirs")
    pipe.save_pretrained(folder / "sharded", max_shard_size="10KB")
    return folder


# --- reading what is quantized ---

_NEW_PROCESS = """
import json, sys
folder = sys.argv[1]
from diffusers import DiffusionPipeline, DiTTransformer2DModel
told = []
reads = [
    lambda: DiTTransformer2DModel.from_pretrained(f"{folder}/sharded", subfolder="transformer", device_map="cpu"),
    lambda: DiffusionPipeline.from_pretrained(f"{folder}/ours").transformer,
    lambda: DiffusionPipeline.from_pretrained(f"{folder}/theirs").transformer,
]
for read in reads:
    try:
        read()
    except ValueError as error:
        told.append(str(error))
import fxquant
from tests.tiny import run
from tests.traces import traced_once
with traced_once():
    outputs = [run(read()) for read in reads]
print(json.dumps({"outputs": [output.tolist() for output in outputs], "told": told}))
"""


@pytest.mark.slow
def test_a_new_process(quantized: GraphModel, pipelines: Path) -> None:
    """Without fxquant the message names it, and with fxquant diffusers reads what it wrote."""
    done = subprocess.run(
        [sys.executable, "-c", _NEW_PROCESS, pipelines], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert all(torch.equal(torch.tensor(output), run(quantized)) for output in found["outputs"])
    assert "Expected types" not in done.stderr
    assert len(found["told"]) == 3
    assert all("got fxquant - supported types" in told for told in found["told"][:2])
    assert "import fxquant before calling `from_pretrained`" in found["told"][2]


_LIGHT = """
import sys
import fxquant
assert not {"torch", "diffusers"} & sys.modules.keys()
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as configs, AUTO_QUANTIZER_MAPPING as quantizers
assert configs["fxquant"] is fxquant.FxQuantConfig
assert quantizers["fxquant"].__name__ == "FxQuantizer"
import inspect, diffusers.quantizers.auto as module
assert "class DiffusersAutoQuantizer" in inspect.getsource(module)
"""


@pytest.mark.slow
def test_importing_fxquant_first_is_light() -> None:
    subprocess.run([sys.executable, "-c", _LIGHT], check=True)


def test_it_is_what_load_returns(quantized: GraphModel, pipelines: Path) -> None:
    folder = pipelines / "sharded" / "transformer"
    assert len(list(folder.glob("*-of-*.safetensors"))) > 1
    loaded = read(folder)
    assert type(loaded) is GraphModel
    assert loaded.plan == quantized.plan
    assert loaded.config._name_or_path == str(folder)
    assert loaded.hf_quantizer.is_serializable
    assert torch.equal(run(loaded, batch=2), run(quantized, batch=2))
    with pytest.raises(fxquant.FxquantError, match="register_to_config"):
        loaded.register_to_config(num_layers=7)


def test_saving_it_again(quantized: GraphModel, pipelines: Path, tmp_path: Path) -> None:
    read(pipelines / "sharded" / "transformer").save_pretrained(tmp_path / "again")
    for path in (pipelines / "theirs" / "transformer").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"device_map": "auto"}, ConfigurationError, "its graph runs on one"),
        ({"device_map": {"": "cpu", "proj_out_1": "disk"}}, ConfigurationError, "its graph runs on one"),
        ({"low_cpu_mem_usage": False}, ValueError, "cannot be False or None when using quantization"),
        ({"use_safetensors": False}, OSError, r"diffusion_pytorch_model\.bin"),
        ({"variant": "fp16"}, OSError, r"diffusion_pytorch_model\.fp16"),
    ],
)
def test_options_that_are_refused(pipelines: Path, options: dict[str, Any], kind: Any, said: str) -> None:
    with pytest.raises(kind, match=said):
        read(pipelines / "ours" / "transformer", **options)


@pytest.mark.parametrize(
    "options",
    [
        {"torch_dtype": torch.float32},
        {"dtype": torch.float32},
        {"device_map": "cpu"},
        {"device_map": {"": "cpu"}},
        {"device_map": torch.device("cpu")},
        {"low_cpu_mem_usage": True},
        {"use_safetensors": True},
    ],
)
def test_options_that_are_accepted(pipelines: Path, options: dict[str, Any]) -> None:
    for loaded in (
        read(pipelines / "ours", subfolder="transformer", **options),
        fxquant.load(pipelines / "ours", subfolder="transformer", **options),
    ):
        assert (type(loaded), loaded.dtype, loaded.device) == (GraphModel, torch.float32, torch.device("cpu"))


def test_variants(quantized: GraphModel, tmp_path: Path) -> None:
    pipe = make_pipeline(quantized)
    for folder, save in ((tmp_path / "a", pipe.save_pretrained), (tmp_path / "b", fxquant.save_pipeline)):
        save(*(() if folder.name == "a" else (pipe,)), folder, variant="fp16", max_shard_size="20KB")
        names = {path.name for path in (folder / "transformer").iterdir()}
        assert "diffusion_pytorch_model.safetensors.index.fp16.json" in names
        assert "diffusion_pytorch_model.fp16-00001-of-00003.safetensors" in names
        assert type(read(folder / "transformer", variant="fp16")) is GraphModel
        for loaded in (
            DiffusionPipeline.from_pretrained(folder, variant="fp16"),
            fxquant.load_pipeline(folder, variant="fp16"),
        ):
            assert torch.equal(run(loaded.transformer), run(quantized))
        with pytest.raises(OSError, match="no file named diffusion_pytorch_model"):
            read(folder / "transformer")


def test_only_the_weights_were_copied(pipelines: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(pipelines / "ours" / "transformer", tmp_path / "copy"))
    (copy / "plan.json").unlink()
    with pytest.raises(CheckpointError, match="only the weights were copied or downloaded"):
        read(copy)


def test_the_rest_of_a_repository_is_downloaded(
    quantized: GraphModel, pipelines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the cache of the hub are the files that diffusers asks for: weights and config."""
    whole = pipelines / "ours" / "transformer"
    place = tmp_path / "models--owner--dit" / "snapshots" / "0123abc" / "transformer"
    place.mkdir(parents=True)
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        shutil.copy(whole / name, place)
    asked = []

    def download(name: str, *, revision: str, cache_dir: Path, allow_patterns: list[str]) -> None:
        asked.append((name, revision, cache_dir, allow_patterns))
        shutil.copytree(whole, place, dirs_exist_ok=True)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(HubError, match="the rest of the checkpoint owner/dit could not be downloaded: offline"):
        read(place)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert torch.equal(run(read(place)), run(quantized))
    assert asked == [("owner/dit", "0123abc", tmp_path, ["transformer/*"])]


def test_a_damaged_checkpoint(pipelines: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(pipelines / "sharded" / "transformer", tmp_path / "copy"))
    shard = sorted(copy.glob("*-of-*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    for load in (read, fxquant.load):
        with pytest.raises(CheckpointError, match=rf"{shard.name} is damaged"):
            load(copy)
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"{shard.name} is missing"):
        fxquant.load(copy)


# --- pipelines ---


def test_a_pipeline_takes_a_quantized_part(
    quantized: GraphModel, floats: Path, pipelines: Path, caplog: pytest.LogCaptureFixture
) -> None:
    part = fxquant.load(pipelines / "ours" / "transformer")
    for folder in (floats, pipelines / "ours", pipelines / "theirs"):
        for load in (DiffusionPipeline.from_pretrained, fxquant.load_pipeline):
            assert load(folder, transformer=part).transformer is part
    assert "Expected types" not in caplog.text
    given = make_dit()
    assert DiffusionPipeline.from_pretrained(pipelines / "theirs", transformer=given).transformer is given


def test_a_part_of_another_kind_is_refused_as_before(floats: Path, pipelines: Path) -> None:
    assert issubclass(DiTTransformer2DModel, PipelineModel)
    assert isinstance(fxquant.load(pipelines / "ours" / "transformer"), PipelineModel)
    assert not issubclass(DDIMScheduler, PipelineModel)
    with pytest.raises(ValueError, match="but should be"):
        DiffusionPipeline.from_pretrained(floats, transformer=DDIMScheduler())
    with pytest.raises(CheckpointError, match=r"a part that was given is of type <class .*DDIMScheduler'>, but should"):
        fxquant.load_pipeline(floats, transformer=DDIMScheduler())


def test_a_dtype_per_part(pipelines: Path) -> None:
    mixed = {"transformer": torch.float32, "default": torch.bfloat16}
    for load in (DiffusionPipeline.from_pretrained, fxquant.load_pipeline):
        pipe = load(pipelines / "ours", dtype=mixed)
        assert (pipe.transformer.dtype, pipe.vae.dtype) == (torch.float32, torch.bfloat16)
    with pytest.raises(ConfigurationError, match="its graph runs on one"):
        fxquant.load_pipeline(pipelines / "ours", device_map="balanced")


def test_a_config_per_component(floats: Path, tmp_path: Path) -> None:
    config = PipelineQuantizationConfig(quant_mapping={"transformer": fxquant.FxQuantConfig("dynamic-w8a8")})
    pipe = DiffusionPipeline.from_pretrained(floats, quantization_config=config)
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.transformer, DiTTransformer2DModel)
    pipe(class_labels=[1], num_inference_steps=2)
    assert type(pipe.transformer) is GraphModel
    fxquant.save_pipeline(pipe, tmp_path / "q")
    assert torch.equal(run(fxquant.load_pipeline(tmp_path / "q").transformer), run(pipe.transformer))


# --- quantizing what is float ---


def test_at_the_first_call(quantized: GraphModel, floats: Path, tmp_path: Path) -> None:
    model = read(floats / "transformer", quantization_config=fxquant.FxQuantConfig("rtn-w4a16"))
    assert type(model) is DiTTransformer2DModel
    with pytest.raises(ValueError, match="quantized with fxquant and is not serializable"):
        model.save_pretrained(tmp_path / "early")
    assert torch.equal(run(model), run(quantized))
    assert type(model) is GraphModel
    assert torch.equal(run(model, batch=2, seed=3), run(quantized, batch=2, seed=3))
    assert model.plan.to_json()["layers"] == quantized.plan.to_json()["layers"]
    assert "quantization_config" not in model.config
    model.save_pretrained(tmp_path / "q")
    assert torch.equal(run(read(tmp_path / "q")), run(model))


def test_a_first_call_that_fails_leaves_a_float_model(floats: Path) -> None:
    model = read(floats / "transformer", quantization_config=fxquant.FxQuantConfig("rtn-w4a16", timestep="time"))
    for _ in range(2):
        with pytest.raises(fxquant.FxquantError, match="no tensor input 'time'"):
            run(model)
        assert type(model) is DiTTransformer2DModel


def test_the_first_call_is_not_compiled(quantized: GraphModel, floats: Path) -> None:
    model = read(floats / "transformer", quantization_config=fxquant.FxQuantConfig("rtn-w4a16"))
    compiled = torch.compile(model, backend="eager")
    for seed in range(2):
        assert torch.equal(run(compiled, seed=seed), run(quantized, seed=seed))
    assert type(model) is GraphModel


def test_a_hook_of_accelerate_stays(quantized: GraphModel, floats: Path) -> None:
    model = read(floats / "transformer", quantization_config=fxquant.FxQuantConfig("rtn-w4a16"))
    hook = CpuOffload(execution_device="cpu")
    add_hook_to_module(model, hook)
    assert torch.equal(run(model), run(quantized))
    assert type(model) is GraphModel
    assert model._hf_hook is hook
    assert torch.equal(run(model), run(quantized))


def test_with_a_calibration(floats: Path) -> None:
    seen: list[nn.Module] = []

    def calibration(model: nn.Module) -> None:
        seen.append(model)
        calibrate(model)()

    config = fxquant.FxQuantConfig("ptq4dit-w8a8", calibrate=calibration)
    model = read(floats / "transformer", quantization_config=config, device_map="cpu")
    assert type(model) is GraphModel
    assert seen
    other = make_dit()
    expected = fxquant.compile(other, recipe="ptq4dit-w8a8", calibrate=calibrate(other))
    assert torch.equal(run(model), run(expected))


@pytest.mark.parametrize(
    "form", [lambda plan, folder: folder, lambda plan, folder: plan, lambda plan, folder: str(folder)]
)
def test_with_a_plan(floats: Path, tmp_path: Path, form: Any) -> None:
    other = make_dit()
    expected = fxquant.compile(other, recipe="ptq4dit-w8a8", calibrate=calibrate(other))
    expected.plan.save(tmp_path / "plan")
    config = fxquant.FxQuantConfig(plan=expected.plan if form == "plan" else tmp_path / "plan")
    model = read(floats, subfolder="transformer", quantization_config=config)
    assert type(model) is GraphModel
    assert torch.equal(run(model), run(expected))


@pytest.mark.parametrize(
    ("recipe", "layers", "said"),
    [
        ("rtn-w8a8", "default", "the ranges of its activations are static"),
        ("ptq4dit-w4a16", "default", "its pass balance-channels decides from activations"),
        ("rtn-gptq-w4a16", "default", "gptq rounds weights by their inputs"),
        ("q-diffusion-w4a16", "default", "its pass reconstruct-blocks decides from activations"),
        ("dynamic-w8a8", "all", "the activations of convolutions and attention have static ranges"),
        ("single-step-w8a8", "default", "its pass observe-step"),
    ],
)
def test_recipes_that_need_a_calibration(floats: Path, recipe: str, layers: str, said: str) -> None:
    config = fxquant.FxQuantConfig(recipe, layers=layers)
    with pytest.raises(CalibrationError, match=f"needs a calibration: {said}.*calibrate=function"):
        read(floats / "transformer", quantization_config=config)


@pytest.mark.parametrize("recipe", ["rtn-w8a16", "rtn-w4a16-g8", "dynamic-w4a8"])
def test_recipes_that_need_none_decide_from_the_weights_alone(floats: Path, recipe: str) -> None:
    """Whatever the first call is, the same codes come out."""
    codes = []
    for seed in (0, 1):
        model = read(floats / "transformer", quantization_config=fxquant.FxQuantConfig(recipe, measure=0))
        run(model, seed=seed, timestep=900 * seed, batch=1 + seed)
        codes.append(model.stored_tensors())
    assert codes[0].keys() == codes[1].keys()
    assert all(torch.equal(codes[0][name], codes[1][name]) for name in codes[0])


def test_configs_that_make_no_sense() -> None:
    for given in ({}, {"recipe": "rtn-w4a16", "plan": "folder"}):
        with pytest.raises(ConfigurationError, match=r"takes a recipe.*or a plan, and not both"):
            fxquant.FxQuantConfig(**given)
    with pytest.raises(UnknownNameError, match="unknown recipe"):
        fxquant.FxQuantConfig("best-w4a16")
    with pytest.raises(ConfigurationError, match="calibrate is a int"):
        fxquant.FxQuantConfig("rtn-w8a8", calibrate=3)


def test_what_a_config_prints() -> None:
    config = fxquant.FxQuantConfig("rtn-w4a16", calibrate=functools.partial(run))
    assert json.loads(config.to_json_string()) == {
        "quant_method": "fxquant",
        "backend": "fake-quant",
        "layers": "default",
        "recipe": "rtn-w4a16",
    }
    assert "FxQuantConfig" in repr(config)
