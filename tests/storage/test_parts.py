"""Folders of VAEs with quantized parts: what is written, read back, replaced and refused."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline
from safetensors.torch import load_file, save_file

import fxquant
from fxquant.errors import CheckpointError, ConfigurationError
from fxquant.runtime.model import GraphModel
from tests.tiny import make_pipeline
from tests.vaes import decoded, encoded, make_vae

read = AutoencoderKL.from_pretrained


@pytest.fixture(scope="module")
def vae() -> Any:
    model = make_vae()
    return fxquant.compile_parts(model, recipe="rtn-w8a8", calibrate=lambda: decoded(model))


@pytest.fixture(scope="module")
def folder(vae: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("parts") / "vae"
    vae.save_pretrained(place)
    return place


def edited(folder: Path, place: Path, **entries: Any) -> Path:
    """A copy of a folder with other entries in ``quantization_config``."""
    shutil.copytree(folder, place)
    path = place / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= entries
    path.write_text(json.dumps(config))
    return place


def test_what_is_written(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "decoder",
        "diffusion_pytorch_model.safetensors",
    }
    config = json.loads((folder / "config.json").read_text())
    assert config["_class_name"] == "AutoencoderKL"
    entry = config["quantization_config"]
    assert (entry["quant_method"], entry["parts"], entry["dtype"]) == ("fxquant", ["decoder"], "float32")
    card = (folder / "decoder" / "README.md").read_text()
    assert "The weights of the decoder of a `AutoencoderKL`" in card
    assert "timestep" not in card


def test_it_is_read_back(vae: Any, folder: Path, tmp_path: Path) -> None:
    model = read(folder)
    assert type(model) is AutoencoderKL and type(model.decoder) is GraphModel
    assert not any(tensor.is_meta for tensor in model.parameters())
    assert torch.equal(decoded(model, seed=1), decoded(vae, seed=1))
    assert torch.equal(encoded(model, seed=1), encoded(vae, seed=1))
    for _ in range(2):
        model.save_pretrained(tmp_path / "again")
    for path in folder.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(folder)).read_bytes(), path.name


def test_variant_and_shards(vae: Any, tmp_path: Path) -> None:
    vae.save_pretrained(tmp_path / "vae", variant="fp16", max_shard_size="1KB")
    assert len([*(tmp_path / "vae").glob("diffusion_pytorch_model.fp16-*.safetensors")]) > 1
    assert torch.equal(decoded(read(tmp_path / "vae", variant="fp16")), decoded(vae))


def test_the_part_alone(vae: Any, folder: Path) -> None:
    """The checkpoint of a part builds the whole model without weights, and takes the part."""
    part = fxquant.load(folder / "decoder", backend="native")
    assert type(part) is GraphModel
    fx = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert (part(fx) - vae.decoder(fx)).abs().max() < 1e-3
    assert fxquant.report(folder / "decoder").model_class == "diffusers:AutoencoderKL/decoder"
    assert fxquant.rewrite_history(folder / "decoder").steps


def test_save_and_load(vae: Any, folder: Path, tmp_path: Path) -> None:
    fxquant.save(vae, tmp_path / "vae")
    with pytest.raises(CheckpointError, match="exists; choose another folder"):
        fxquant.save(vae, tmp_path / "vae")
    fxquant.save(vae, tmp_path / "vae", overwrite=True)
    for options in ({}, {"backend": "native"}):
        model = fxquant.load(tmp_path / "vae", **options)
        assert type(model) is AutoencoderKL
        assert (decoded(model) - decoded(vae)).abs().max() < 1e-3
    assert model.decoder.backend.name == "native"


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(vae: Any, tmp_path: Path, copied: Any) -> None:
    model = copied(vae)
    assert type(model) is AutoencoderKL
    assert torch.equal(decoded(model), decoded(vae))
    model.save_pretrained(tmp_path / "vae")
    assert torch.equal(decoded(read(tmp_path / "vae")), decoded(vae))


def test_nothing_but_parts_stays_float(tmp_path: Path) -> None:
    """The file of float weights is empty then, and diffusers still finds it."""
    blocks = {"encoder_block_out_channels": (8,), "decoder_block_out_channels": (8,)}
    torch.manual_seed(0)
    model = AutoencoderTiny(**blocks, num_encoder_blocks=(1,), num_decoder_blocks=(1,)).eval()
    image = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        made = fxquant.compile_parts(model, recipe="rtn-w8a8", calibrate=lambda: model(image))
        made.save_pretrained(tmp_path / "vae")
        again = AutoencoderTiny.from_pretrained(tmp_path / "vae")
        assert torch.equal(again(image).sample, made(image).sample)


@pytest.mark.parametrize("parts", [["../decoder"], ["transformer"], [], "decoder", None, [["decoder"]]])
def test_names_that_are_no_parts(folder: Path, tmp_path: Path, parts: Any) -> None:
    with pytest.raises(CheckpointError, match="does not name quantized parts"):
        read(edited(folder, tmp_path / "vae", parts=parts))


def test_damaged_folders(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"encoder.plan\.json is missing"):
        read(edited(folder, tmp_path / "more", parts=["decoder", "encoder"]))
    swapped = edited(folder, tmp_path / "swapped", parts=["encoder"])
    (swapped / "decoder").rename(swapped / "encoder")
    with pytest.raises(CheckpointError, match="holds a part of diffusers:AutoencoderKL/decoder, not"):
        read(swapped)
    damaged = Path(shutil.copytree(folder, tmp_path / "damaged"))
    content = bytearray((damaged / "decoder" / "diffusion_pytorch_model.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "decoder" / "diffusion_pytorch_model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        read(damaged)


def test_float_layers_that_are_missing(vae: Any, folder: Path, tmp_path: Path) -> None:
    """Some remove the encoder to save memory. A folder without it could not be read."""
    model = copy.deepcopy(vae)
    del model.encoder
    assert torch.equal(decoded(model), decoded(vae))
    with pytest.raises(CheckpointError, match=r"would not build this Autoenc.*: tensor 'encoder.*was removed"):
        model.save_pretrained(tmp_path / "vae")
    assert not (tmp_path / "vae").exists()
    damaged = Path(shutil.copytree(folder, tmp_path / "damaged")) / "diffusion_pytorch_model.safetensors"
    tensors = load_file(damaged)
    del tensors["quant_conv.weight"]
    save_file(tensors, damaged, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 'quant_conv\.weight' and 0 more tensors of a AutoencoderKL"):
        read(damaged.parent)


def test_the_rest_of_a_repository_is_downloaded(
    vae: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the cache of the hub are the files that diffusers asks for: the config and the weights beside the parts."""
    place = tmp_path / "models--owner--sd" / "snapshots" / "0123abc" / "vae"
    place.mkdir(parents=True)
    for path in folder.iterdir():
        if path.is_file():
            shutil.copy(path, place)
    asked = []

    def download(name: str, allow_patterns: list[str], **_: Any) -> None:
        asked.append((name, allow_patterns))
        shutil.copytree(folder, place, dirs_exist_ok=True)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert torch.equal(decoded(read(place)), decoded(vae))
    assert asked == [("owner/sd", ["vae/*"])]


def test_what_is_never_replaced(vae: Any, folder: Path, tmp_path: Path) -> None:
    make_vae().save_pretrained(tmp_path / "float")
    with pytest.raises(CheckpointError, match="something other than a model with quantized parts"):
        vae.save_pretrained(tmp_path / "float")
    own = Path(shutil.copytree(folder, tmp_path / "own"))
    (own / "decoder" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="something other"):
        vae.save_pretrained(own)
    for options in ({"safe_serialization": False}, {"other": 1}):
        with pytest.raises(ConfigurationError):
            vae.save_pretrained(tmp_path / "new", **options)
    assert (own / "decoder" / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "new").exists()


def test_pipelines(vae: Any, tmp_path: Path) -> None:
    """As fxquant and as diffusers write them, and as either reads them."""
    pipe = make_pipeline()
    pipe.vae = vae
    fxquant.save_pipeline(pipe, tmp_path / "ours")
    pipe.save_pretrained(tmp_path / "theirs")
    assert "`vae.decoder` was quantized" in (tmp_path / "ours" / "README.md").read_text()
    fxquant.save_pipeline(pipe, tmp_path / "ours", overwrite=True)
    for folder, load in (
        (tmp_path / "ours", DiffusionPipeline.from_pretrained),
        (tmp_path / "theirs", fxquant.load_pipeline),
    ):
        loaded = load(folder).vae
        assert type(loaded) is AutoencoderKL and type(loaded.decoder) is GraphModel
        assert torch.equal(decoded(loaded), decoded(vae))
    (tmp_path / "ours" / "vae" / "decoder" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds more than a pipeline"):
        fxquant.save_pipeline(pipe, tmp_path / "ours", overwrite=True)


def test_parts_of_another_dtype_than_the_transformer(tmp_path: Path) -> None:
    model = make_vae().to(torch.bfloat16)
    pipe = make_pipeline()
    pipe.vae = fxquant.compile_parts(model, recipe="rtn-w8a16", calibrate=lambda: decoded(model))
    fxquant.save_pipeline(pipe, tmp_path / "q")
    assert fxquant.load_pipeline(tmp_path / "q").vae.dtype is torch.bfloat16


def test_a_decoder_that_was_compiled_by_hand(tmp_path: Path) -> None:
    """The class of the VAE could not read its codes back, so the pipeline is not written."""
    pipe = make_pipeline()
    options: dict[str, Any] = {"recipe": "rtn-w8a16", "layers": "all", "timestep": None}
    pipe.vae.decoder = fxquant.compile(pipe.vae.decoder, calibrate=lambda: decoded(pipe.vae), **options)
    with pytest.raises(ConfigurationError, match=r"'decoder' in part 'vae' .*use fxquant\.compile_parts"):
        fxquant.save_pipeline(pipe, tmp_path / "q")
    assert not list(tmp_path.iterdir())
