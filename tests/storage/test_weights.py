"""The files of the tensors of a checkpoint: names, shards and variants."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fxquant.errors import CheckpointError, ConfigurationError
from fxquant.storage.weights import headers_of, is_weights_file, load_weights, variant_of, weight_names, write_weights

TENSORS = {name: torch.full((256,), number) for number, name in enumerate("abc")}  # Of 2 KiB each.
DIT = "diffusers:DiTTransformer2DModel"


@pytest.mark.parametrize(
    ("model_class", "options", "names"),
    [
        (DIT, {}, ["diffusion_pytorch_model.safetensors"]),
        (DIT, {"variant": "fp16"}, ["diffusion_pytorch_model.fp16.safetensors"]),
        ("mine:Model", {}, ["model.safetensors"]),
        (
            DIT,
            {"max_shard_size": 4096},
            [
                "diffusion_pytorch_model-00001-of-00002.safetensors",
                "diffusion_pytorch_model-00002-of-00002.safetensors",
                "diffusion_pytorch_model.safetensors.index.json",
            ],
        ),
        (
            "transformers.models.t5.modeling_t5:T5EncoderModel",
            {"max_shard_size": "5KB", "variant": "int-8"},
            [
                "model.int-8-00001-of-00002.safetensors",
                "model.int-8-00002-of-00002.safetensors",
                "model.safetensors.index.int-8.json",
            ],
        ),
    ],
)
def test_what_is_written_is_read(tmp_path: Path, model_class: str, options: dict[str, Any], names: list[str]) -> None:
    assert write_weights(TENSORS, tmp_path, model_class, **options) == names
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert all(map(is_weights_file, names))
    paths = [tmp_path / name for name in weight_names(names, options.get("variant"))]
    loaded = load_weights(paths, torch.device("cpu"))
    assert all(torch.equal(loaded[name], TENSORS[name]) for name in TENSORS)
    assert headers_of(paths).keys() == TENSORS.keys()
    assert variant_of(names) == options.get("variant")
    if len(names) > 1:
        index = json.loads((tmp_path / names[-1]).read_text())
        assert index["weight_map"] == {"a": names[0], "b": names[0], "c": names[1]}
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())


@pytest.mark.parametrize(
    "name", ["plan.safetensors", "../model.safetensors", "model.bin", "my_model.safetensors", "model.index.json", "m"]
)
def test_other_names(name: str) -> None:
    assert not is_weights_file(name)
    with pytest.raises(CheckpointError, match="the tensors are missing"):
        weight_names([name])


def test_another_variant() -> None:
    with pytest.raises(CheckpointError, match="no variant 'fp16': the checkpoint holds no variant"):
        weight_names(["model.safetensors"], "fp16")
    with pytest.raises(CheckpointError, match="holds the variant 'bf16'; read it with variant='bf16'"):
        weight_names(["model.bf16.safetensors"], "fp16")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"variant": "../x"}, "cannot be part of a file name"),
        ({"variant": ""}, "cannot be part of a file name"),
        ({"max_shard_size": "much"}, "max_shard_size='much' is not a size"),
    ],
)
def test_options_that_make_no_sense(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        write_weights(TENSORS, tmp_path, DIT, **options)
    assert not list(tmp_path.iterdir())


def test_one_name_in_two_files(tmp_path: Path) -> None:
    write_weights(TENSORS, tmp_path, DIT)
    write_weights({"b": TENSORS["b"]}, tmp_path, "mine:Model")
    with pytest.raises(CheckpointError, match=r"model\.safetensors holds tensor 'b', and so does another file"):
        headers_of(sorted(tmp_path.iterdir()))
