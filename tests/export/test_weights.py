"""Formats that hold weights: what their own code, or the definition of the format, reads from them."""

from __future__ import annotations

import json
import warnings
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import fxquant
from fxquant.errors import BackendError, CheckpointError, ConfigurationError
from fxquant.export.checkpoints import TENSORS_FILE
from fxquant.export.comfyui import export_comfyui
from fxquant.export.compressed_tensors import export_compressed_tensors
from fxquant.export.int8 import export_int8
from fxquant.export.weights import IN_PLACE
from fxquant.runtime.model import GraphModel
from tests.export.small import Small, small_call
from tests.tiny import calibrate, inputs, make_dit

WEIGHTS_ONLY = IN_PLACE.replace("precision=w8a8", "precision=w8a16")
ASYMMETRIC = WEIGHTS_ONLY.replace("symmetric=True", "symmetric=False")


@cache
def quantized(recipe: str, **options: Any) -> GraphModel:
    """A quantized DiT, which tests must not change."""
    model = make_dit(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fxquant.compile(model, recipe=recipe, calibrate=calibrate(model), measure=0, **options)


def output(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs(batch=3)).sample
    return found


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def dequantized(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model, as the definition of the format says: weight times scale, per row."""
    state = {}
    for name in model.state_dict():
        scale = tensors.get(f"{name}_scale")
        state[name] = tensors[name] if scale is None else tensors[name].float() * scale
    return state


def with_weights(tensors: dict[str, Tensor]) -> Any:
    """A DiT with these tensors."""
    model = make_dit(1)
    model.load_state_dict(dequantized(tensors, model))
    return model


@pytest.mark.parametrize("recipe", [WEIGHTS_ONLY, ASYMMETRIC, ASYMMETRIC.replace("w8a16", "w4a16-g8")])
def test_compressed_tensors_decompresses_the_same_weights(recipe: str, tmp_path: Path) -> None:
    package = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    model = quantized(recipe)
    folder = export_compressed_tensors(model, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    config.pop("quant_method")
    read = make_dit(1)
    scheme = package.QuantizationConfig.model_validate(config)
    package.apply_quantization_config(read, scheme)
    compressor = compressors.ModelCompressor(quantization_config=scheme)
    compressor.compress_model(read)
    missing, unexpected = read.load_state_dict(load_file(folder / TENSORS_FILE), strict=False)
    assert not unexpected and not missing
    compressor.decompress_model(read)
    weights = [parameter for name, parameter in read.named_parameters() if name.endswith(".weight")]
    assert all(weight.dtype is torch.float32 for weight in weights)
    for module in read.modules():
        module.quantization_enabled = False  # Activations stay float, as in the recipe.
    assert error(output(read), output(model)) < 1e-5


def test_compressed_tensors_config_names_layers(tmp_path: Path) -> None:
    folder = export_compressed_tensors(quantized(WEIGHTS_ONLY, layers="blocks"), tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    assert config["_class_name"] == "DiTTransformer2DModel"
    (group,) = config["quantization_config"]["config_groups"].values()
    assert "transformer_blocks.0.attn1.to_q" in group["targets"] and group["weights"]["symmetric"] is True
    assert "proj_out_2" in config["quantization_config"]["ignore"]
    tensors = load_file(folder / TENSORS_FILE)
    assert tensors["transformer_blocks.0.attn1.to_q.weight"].dtype is torch.int8
    assert tensors["transformer_blocks.0.attn1.to_q.weight_scale"].shape == (16, 1)
    assert tensors["proj_out_2.weight"].dtype is torch.float32


def test_int8_as_vllm_omni_reads_it(tmp_path: Path) -> None:
    model = quantized(WEIGHTS_ONLY, layers="blocks")
    folder = export_int8(model, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["activation_scheme"]) == ("int8", "dynamic")
    tensors = load_file(folder / TENSORS_FILE)
    scales = {name.removesuffix(".weight_scale"): value for name, value in tensors.items() if name.endswith("_scale")}
    linears = {name for name, module in make_dit(1).named_modules() if isinstance(module, nn.Linear)}
    assert scales.keys() | set(config["ignored_layers"]) == linears and not scales.keys() & set(
        config["ignored_layers"]
    )
    for name, scale in scales.items():
        weight = tensors[f"{name}.weight"]
        assert (weight.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (len(weight), 1))
    assert error(output(with_weights(tensors)), output(model)) < 1e-5


@pytest.mark.parametrize("export", [export_compressed_tensors, export_int8])
def test_a_shared_weight_is_written_under_each_name(export: Any, tmp_path: Path) -> None:
    model = Small(tied=True)
    made = fxquant.compile(model, recipe=WEIGHTS_ONLY, calibrate=lambda: model(**small_call()), measure=0)
    tensors = load_file(export(made, tmp_path / "out") / TENSORS_FILE)
    read = Small()
    read.load_state_dict(dequantized(tensors, read))
    with torch.no_grad():
        assert error(read(**small_call(seed=1)), made(**small_call(seed=1))) < 1e-5


def test_tensors_that_no_call_reads_come_from_the_original(tmp_path: Path) -> None:
    model = Small(spare=True)
    made = fxquant.compile(model, recipe=WEIGHTS_ONLY, calibrate=lambda: model(**small_call()), measure=0)
    exports = export_compressed_tensors, export_int8, partial(export_comfyui, names="class", prefix="")
    for number, export in enumerate(exports):
        out = tmp_path / str(number)
        with pytest.raises(ConfigurationError, match=r"no call read 2 of them, .* 'spare\.weight'.*original=model"):
            export(made, out)
        with pytest.raises(ConfigurationError, match="original is a Linear, and the quantized model was a Small"):
            export(made, out, original=nn.Linear(1, 1))
        with pytest.raises(ConfigurationError, match=r"original has no 'spare\.weight'"):
            export(made, out, original=Small())
        assert not out.exists()
        found = export(made, out, original=model)
        tensors = load_file(found if found.is_file() else found / TENSORS_FILE)
        assert model.spare is not None and torch.equal(tensors["spare.weight"], model.spare.weight)
        assert tensors["blocks.0.first.weight"].dtype is torch.int8


@pytest.mark.parametrize(
    ("export", "recipe", "message"),
    [
        (export_comfyui, ASYMMETRIC, "not symmetric about 0: transformer_blocks.0"),
        (export_int8, ASYMMETRIC, "not symmetric about 0: transformer_blocks.0"),
        (export_comfyui, WEIGHTS_ONLY.replace("w8a16", "w8a16-g8"), "groups of 8: transformer_blocks.0"),
        (export_compressed_tensors, "repq-w8a8", "tensor was added or copied|factor is multiplied"),
        (export_compressed_tensors, "htg-w8a8", "tensor was added or copied|factor is multiplied"),
    ],
)
def test_refuses_what_a_format_cannot_hold(export: Any, recipe: str, message: str, tmp_path: Path) -> None:
    if recipe.startswith("htg"):
        recipe = str(fxquant.make_recipe(recipe).with_options("group-timesteps", groups=2))
    if recipe.startswith("repq"):
        recipe = str(fxquant.make_recipe(recipe).with_options("balance-channels", dearest="tokens"))
    with pytest.raises(ConfigurationError, match=message) as caught:
        export(quantized(recipe), tmp_path / "out")
    assert IN_PLACE in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_refuses_other_backends_and_full_folders(tmp_path: Path) -> None:
    model = quantized.__wrapped__(WEIGHTS_ONLY)
    (tmp_path / "mine").write_text("keep")
    for export in (partial(export_comfyui, names="class"), export_compressed_tensors, export_int8):
        with pytest.raises(CheckpointError, match="not empty"):
            export(model, tmp_path)
    model.backend.name = "native"  # type: ignore[union-attr,misc]
    for export in (export_comfyui, export_compressed_tensors, export_int8):
        with pytest.raises(BackendError, match="needs its codes"):
            export(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
