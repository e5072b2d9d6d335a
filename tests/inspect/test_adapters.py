"""Reports and explanations show the LoRAs of a model, the same for the model and its checkpoint."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fxquant
from fxquant.cli.__main__ import app
from fxquant.errors import CheckpointError
from fxquant.inspect.adapters import AdapterReport, branches_of
from fxquant.planning.plan import Plan
from fxquant.runtime.model import GraphModel
from tests.adapters.loras import lora
from tests.tiny import calibrate, make_dit

MODEL = make_dit()
Q = "transformer_blocks.0.attn1.to_q"
EACH = 4 * 2 * 16  # Bytes of one rank beside a layer with 16 inputs and outputs.


@pytest.fixture(scope="module")
def quantized() -> GraphModel:
    made = fxquant.compile(MODEL, recipe="rtn-w8a8", calibrate=calibrate(MODEL), measure=0)
    made.load_lora_adapter(lora(MODEL, rank=4, targets=("to_q", "to_k")), adapter_name="style")
    mixed = lora(MODEL, rank=2, targets=("to_q",)) | lora(MODEL, rank=3, targets=("to_v",))
    made.load_lora_adapter(mixed, adapter_name="sketch")
    made.set_adapters(["sketch"], [0.5])
    return made


@pytest.fixture(scope="module")
def folder(quantized: GraphModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("checkpoint") / "transformer"
    fxquant.save(quantized, made)
    return made


def test_the_report_lists_them(quantized: GraphModel, folder: Path) -> None:
    found = fxquant.report(quantized)
    assert found.adapters == (
        AdapterReport("style", False, 2, (4, 4), (1.0, 1.0), 8 * EACH),
        AdapterReport("sketch", True, 2, (2, 3), (0.5, 0.5), 5 * EACH),
    )
    assert fxquant.report(folder) == fxquant.report(folder.parent) == found
    text = str(found)
    assert "LoRAs        2 loaded, sketch active" in text
    assert ["sketch", "active", "2", "2..3", "0.5", "640", "bytes"] in [line.split() for line in text.splitlines()]
    assert found.to_json()["adapters"][1]["ranks"] == [2, 3]


def test_none_are_active(quantized: GraphModel) -> None:
    made = copy.copy(quantized)
    made.disable_lora()
    assert "LoRAs        2 loaded, none active" in fxquant.report(made).summary()
    assert not any(adapter.active for adapter in fxquant.report(made).adapters)


def test_without_loras_nothing_is_said(quantized: GraphModel) -> None:
    made = copy.copy(quantized)
    made.unload_lora()
    assert quantized.plan is not None
    sources: list[GraphModel | Plan] = [made, quantized.plan]
    for source in sources:
        found = fxquant.report(source)
        assert not found.adapters and "LoRA" not in str(found) and "adapters" not in found.to_json()


def test_a_layer_is_explained_with_them(quantized: GraphModel, folder: Path) -> None:
    for source in (quantized, folder):
        found = fxquant.explain(source, Q)
        assert [(one.adapter, one.rank, one.scale, one.active) for one in found.adapters] == [
            ("style", 4, 1.0, False),
            ("sketch", 2, 0.5, True),
        ]
        assert "LoRA           sketch: rank 2, scale 0.5, 256 bytes, active" in str(found)
    assert not fxquant.explain(quantized, Q.replace("to_q", "to_out.0")).adapters


def test_the_command(folder: Path) -> None:
    made = CliRunner().invoke(app, ["report", str(folder), "--json"])
    assert made.exit_code == 0, made.output
    assert [adapter["name"] for adapter in json.loads(made.stdout)["adapters"]] == ["style", "sketch"]


def test_a_damaged_file_is_refused(quantized: GraphModel, tmp_path: Path) -> None:
    fxquant.save(quantized, tmp_path / "made")
    (tmp_path / "made" / "adapters.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"adapters\.safetensors cannot be read"):
        branches_of(tmp_path / "made")
