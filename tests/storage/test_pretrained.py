"""``save_pretrained`` and ``push_to_hub`` of quantized models, model cards, and earlier checkpoints."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils import hub_utils

import fxquant
from fxquant.disk.files import digest_of
from fxquant.errors import CheckpointError, ConfigurationError, HubError
from fxquant.runtime.model import GraphModel
from fxquant.storage.card import is_own_card
from tests.tiny import make_dit, make_pipeline, run


@pytest.fixture(scope="module")
def quantized() -> GraphModel:
    model = make_dit()
    return fxquant.compile(model, recipe="rtn-w4a16", calibrate=lambda: run(model))


class Hub:
    """In place of the Hugging Face Hub: keeps what was uploaded."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.files: dict[str, bytes] = {}
        self.options: dict[str, Any] = {}
        self.created: dict[str, Any] = {}

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        """What huggingface_hub.create_repo does."""
        if self.error is not None:
            raise self.error
        self.created = {"repo_id": repo_id, **options}
        return type("Url", (), {"repo_id": repo_id if "/" in repo_id else f"me/{repo_id}"})

    def upload_folder(self, *, folder_path: str | Path, **options: Any) -> str:
        """What huggingface_hub.upload_folder does."""
        self.files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        self.options = options
        return f"uploaded to {options['repo_id']}"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(hub_utils, "create_repo", hub.create_repo)
    monkeypatch.setattr(hub_utils, "upload_folder", hub.upload_folder)
    return hub


def test_push_to_hub(quantized: GraphModel, hub: Hub, tmp_path: Path) -> None:
    assert quantized.push_to_hub("owner/dit", private=True, token="t") == "uploaded to owner/dit"
    fxquant.save(quantized, tmp_path / "saved")
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    assert hub.created == {"repo_id": "owner/dit", "exist_ok": True, "private": True, "token": "t"}
    assert (hub.options["token"], hub.options["create_pr"]) == ("t", False)


def test_save_and_push(quantized: GraphModel, hub: Hub, tmp_path: Path) -> None:
    quantized.save_pretrained(
        tmp_path / "my-dit", push_to_hub=True, commit_message="W4", variant="int4", create_pr=True
    )
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "my-dit").iterdir()}
    assert hub.options["repo_id"] == "me/my-dit"
    assert (hub.options["commit_message"], hub.options["create_pr"]) == ("W4", True)
    assert "diffusion_pytorch_model.int4.safetensors" in hub.files


@pytest.mark.parametrize(
    "error", [ConnectionError("no route to host"), OSError("401 Client Error"), ValueError("bad name")]
)
def test_a_hub_that_cannot_be_reached(quantized: GraphModel, hub: Hub, tmp_path: Path, error: Exception) -> None:
    hub.error = error
    with pytest.raises(HubError, match=rf"owner/dit could not be written to the Hugging Face Hub: {error}\. Check"):
        quantized.push_to_hub("owner/dit")
    with pytest.raises(ConnectionError):
        quantized.save_pretrained(tmp_path / "dit", push_to_hub=True)
    assert torch.equal(run(fxquant.load(tmp_path / "dit")), run(quantized))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"safe_serialization": False}, "as safetensors only.*leave out safe_serialization=False"),
        ({"save_function": torch.save}, "as safetensors only.*leave out save_function"),
        ({"use_flashpack": True}, "no option 'use_flashpack'"),
        ({"repo_id": "owner/dit"}, "no option 'repo_id'"),
        ({"push_to_hub": True, "colour": "red"}, "no option 'colour'"),
        ({"variant": "a/b"}, "cannot be part of a file name"),
    ],
)
def test_options_that_are_refused(quantized: GraphModel, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        quantized.save_pretrained(tmp_path / "dit", **options)
    assert not list(tmp_path.iterdir())


def test_only_the_main_process_writes(quantized: GraphModel, tmp_path: Path) -> None:
    quantized.save_pretrained(tmp_path / "dit", is_main_process=False)
    assert not list(tmp_path.iterdir())


def test_a_folder_holds_one_variant(quantized: GraphModel, tmp_path: Path) -> None:
    quantized.save_pretrained(tmp_path / "dit", variant="int4")
    with pytest.raises(CheckpointError, match="holds the variant 'int4', and the variant None would replace it"):
        quantized.save_pretrained(tmp_path / "dit")
    quantized.save_pretrained(tmp_path / "dit", variant="int4", max_shard_size="20KB")
    assert fxquant.load(tmp_path / "dit").plan == quantized.plan
    assert fxquant.load(tmp_path / "dit", variant="int4").plan == quantized.plan
    with pytest.raises(CheckpointError, match="there is no variant 'fp16'"):
        fxquant.load(tmp_path / "dit", variant="fp16")
    quantized.save_pretrained(tmp_path / "dit", variant="int4")  # No shard of the earlier save is left.
    assert sum(path.suffix == ".safetensors" for path in (tmp_path / "dit").iterdir()) == 2


def test_the_card(quantized: GraphModel, tmp_path: Path) -> None:
    quantized.save_pretrained(tmp_path / "dit")
    path = tmp_path / "dit" / "README.md"
    text = path.read_text()
    assert text.startswith("---\nlibrary_name: diffusers\n")
    assert "DiTTransformer2DModel.from_pretrained" in text
    assert f"{quantized.plan.bytes_after:,} bytes, of {quantized.plan.bytes_before:,} in float" in text
    assert re.search(r"\| SQNR of the output \| \d+\.\d dB", text)
    assert "| layers with 4-bit weights and float activations | 7 |" in text
    assert quantized.plan.recipe in text
    for name in ("config.json", "diffusion_pytorch_model.safetensors", "plan.safetensors"):
        assert f"| {name} | {hashlib.sha256((path.parent / name).read_bytes()).hexdigest()} |" in text
    assert is_own_card(path)
    fxquant.save(quantized, path.parent, overwrite=True)


def test_an_edited_card_is_kept(quantized: GraphModel, tmp_path: Path) -> None:
    fxquant.save_pipeline(make_pipeline(quantized), tmp_path / "pipe")
    for path in (tmp_path / "pipe" / "README.md", tmp_path / "pipe" / "transformer" / "README.md"):
        own = path.read_text()
        path.write_text(own.replace("quantized", "squeezed", 1))
        assert not is_own_card(path)
        with pytest.raises(CheckpointError, match=r"README\.md"):
            fxquant.save_pipeline(make_pipeline(quantized), tmp_path / "pipe", overwrite=True)
        path.write_text(own)
    with pytest.raises(CheckpointError, match=r"more than a checkpoint"):
        (tmp_path / "pipe" / "transformer" / "README.md").write_text("mine")
        quantized.save_pretrained(tmp_path / "pipe" / "transformer")


def test_the_card_of_a_pipeline(quantized: GraphModel, tmp_path: Path) -> None:
    fxquant.save_pipeline(make_pipeline(quantized), tmp_path / "pipe")
    text = (tmp_path / "pipe" / "README.md").read_text()
    assert "# DiTPipeline, quantized" in text
    assert "`transformer` was quantized" in text
    fxquant.save_pipeline(make_pipeline(quantized), tmp_path / "pipe", overwrite=True)


def test_an_earlier_checkpoint(quantized: GraphModel, tmp_path: Path) -> None:
    """They have one ``model.safetensors``, no card, and no entry of their own in the config."""
    folder = tmp_path / "dit"
    fxquant.save(quantized, folder)
    (folder / "README.md").unlink()
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    data = json.loads((folder / "plan.json").read_text())
    data["files"]["model.safetensors"] = data["files"].pop("diffusion_pytorch_model.safetensors")
    data["files"]["config.json"] = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    del data["digest"]
    (folder / "plan.json").write_text(json.dumps(data | {"digest": digest_of(data)}, indent=1) + "\n")
    loaded = fxquant.load(folder)
    assert torch.equal(run(loaded), run(quantized))
    fxquant.save(loaded, folder, overwrite=True)
    assert not (folder / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": torch.float8_e4m3fn}, "computes in float16, bfloat16, float32 or float64"),
        ({"dtype": "bfloat16"}, "is not a dtype of torch"),
        ({"device_map": "balanced"}, "its graph runs on one"),
        ({"device_map": "nowhere"}, "names no device"),
        ({"low_cpu_mem_usage": False}, "would make float weights"),
        ({"use_safetensors": False}, "asks for a pickle"),
        ({"revision": "main"}, "there is no option 'revision'"),
    ],
)
def test_options_of_load_that_are_refused(
    quantized: GraphModel, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    fxquant.save(quantized, tmp_path / "dit")
    with pytest.raises(ConfigurationError, match=said):
        fxquant.load(tmp_path, subfolder="dit", **options)
