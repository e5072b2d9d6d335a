"""A checkpoint holds the LoRAs of a model; packages do not."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fxquant
from fxquant.disk.files import digest, digest_of
from fxquant.errors import AdapterError, CheckpointError
from fxquant.export.comfyui import export_comfyui
from fxquant.export.compressed_tensors import export_compressed_tensors
from fxquant.export.onnx import export_onnx
from fxquant.runtime.model import GraphModel
from fxquant.storage.adapters import ADAPTERS_FILE
from tests.adapters.loras import lora
from tests.tiny import calibrate, make_dit, run

MODEL = make_dit()


@pytest.fixture(scope="module")
def base() -> GraphModel:
    return fxquant.compile(MODEL, recipe="smoothquant-w8a8", calibrate=calibrate(MODEL), measure=0)


@pytest.fixture
def quantized(base: GraphModel) -> GraphModel:
    """With two adapters, of which one is active."""
    made = copy.copy(base)
    made.load_lora_adapter(lora(MODEL), adapter_name="a", network_alphas=None)
    made.load_lora_adapter(lora(MODEL, rank=2, seed=1, targets=("to_q", "net.2")), adapter_name="b")
    made.set_adapters(["b"], [0.7])
    return made


def test_adapters_are_loaded_again(quantized: GraphModel, tmp_path: Path) -> None:
    one = run(quantized)
    fxquant.save(quantized, tmp_path / "made")
    made = fxquant.load(tmp_path / "made")
    assert torch.equal(run(made), one)
    assert [*made.peft_config] == ["a", "b"] and made.active_adapters() == ["b"]
    for model in (quantized, made):
        model.set_adapters(["a", "b"], [0.3, 1.0])
    assert torch.equal(run(made), run(quantized))
    fxquant.save(made, tmp_path / "made", overwrite=True)
    made.unload_lora()
    quantized.disable_lora()
    assert torch.equal(run(made), run(quantized))
    fxquant.save(made, tmp_path / "made", overwrite=True)
    assert not (tmp_path / "made" / ADAPTERS_FILE).exists()


def test_weights_alphas_and_switches_are_loaded_again(base: GraphModel, tmp_path: Path) -> None:
    made, adapter = copy.copy(base), lora(MODEL)
    paths = [key.removesuffix(".lora_A.weight") for key in adapter if key.endswith("lora_A.weight")]
    made.load_lora_adapter(adapter, adapter_name="a", network_alphas={f"{path}.alpha": 3.0 for path in paths})
    made.set_adapters("a", {"attn1": 0.5, "ff": 1.7})
    made.disable_lora()
    fxquant.save(made, tmp_path / "made")
    again = fxquant.load(tmp_path / "made")
    assert torch.equal(run(again), run(base))
    for model in (made, again):
        model.enable_lora()
    assert torch.equal(run(again), run(made))
    made.set_adapters("a")
    again.set_adapters("a")
    assert torch.equal(run(again), run(made))


def test_a_swapped_adapter_is_loaded_again(quantized: GraphModel, tmp_path: Path) -> None:
    quantized.load_lora_adapter(lora(MODEL, rank=1, seed=5), adapter_name="b", hotswap=True)
    before = run(quantized)
    fxquant.save(quantized, tmp_path / "made")
    assert torch.equal(run(fxquant.load(tmp_path / "made")), before)


def test_pickles_hold_them(quantized: GraphModel) -> None:
    assert torch.equal(run(pickle.loads(pickle.dumps(quantized))), run(quantized))


def edited(folder: Path, change: Any) -> None:
    """Change the description or the tensors of the adapters in a checkpoint, with digests that fit."""
    tensors, plan = load_file(folder / ADAPTERS_FILE), json.loads((folder / "plan.json").read_text())
    change(tensors, plan["adapters"])
    save_file(tensors, folder / ADAPTERS_FILE)
    plan["files"][ADAPTERS_FILE] = digest(folder / ADAPTERS_FILE)
    plan["digest"] = digest_of(plan)
    (folder / "plan.json").write_text(json.dumps(plan, indent=1) + "\n")


def _widen(tensors: dict[str, Any], _: Any) -> None:
    key = next(key for key in tensors if key.endswith("to_q.lora_A.weight"))
    tensors[key] = torch.ones(4, 99)


EDITS = {
    "a tensor too many": (lambda t, _: t.update(other=torch.ones(1)), "tensor 'other' is in the file"),
    "a tensor too few": (lambda t, _: t.pop(next(iter(t))), "is in the file of the adapters or in their description"),
    "a wider tensor": (_widen, "attn1.to_q' has 16 inputs"),
    "not a number": (lambda t, _: t.update({k: v * torch.nan for k, v in t.items()}), "hold NaN"),
    "no such adapter": (lambda _, d: d.update(active=["c"]), "could not be found: c"),
    "another type": (lambda _, d: d.update(disabled="no"), "disabled"),
    "an entry too many": (lambda _, d: d["adapters"][0].update(code="x"), "no such entry"),
    "an infinite scale": (lambda _, d: d["adapters"][0]["scales"].update(x=float("inf")), "finite number"),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_file_that_was_edited_is_refused(quantized: GraphModel, tmp_path: Path, name: str) -> None:
    change, message = EDITS[name]
    fxquant.save(quantized, tmp_path / "made")
    edited(tmp_path / "made", change)
    with pytest.raises(CheckpointError, match=message):
        fxquant.load(tmp_path / "made")


def test_a_damaged_or_missing_file_is_refused(quantized: GraphModel, tmp_path: Path) -> None:
    fxquant.save(quantized, tmp_path / "made")
    file = tmp_path / "made" / ADAPTERS_FILE
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{ADAPTERS_FILE} is damaged"):
        fxquant.load(tmp_path / "made")
    file.unlink()
    with pytest.raises(CheckpointError, match=f"{ADAPTERS_FILE} is missing"):
        fxquant.load(tmp_path / "made")


@pytest.mark.parametrize(
    "export",
    [fxquant.export_aot, export_comfyui, export_compressed_tensors, export_onnx],
    ids=lambda export: export.__name__,
)
def test_what_is_made_for_other_tools_cannot_hold_them(quantized: GraphModel, tmp_path: Path, export: Any) -> None:
    with pytest.raises(AdapterError, match=r"cannot hold the adapters 'a', 'b'.*unload_lora"):
        export(quantized, tmp_path / "made")
    assert not (tmp_path / "made").exists()
