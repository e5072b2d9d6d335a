"""``fxquant quantize --dry-run``: compared with real conversions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from typer.testing import CliRunner

import fxquant
from fxquant.cli.__main__ import app
from fxquant.inspect.forecast import forecast
from tests.tiny import make_dit, make_pipeline
from tests.zoo.models import ENTRIES
from tests.zoo.test_zoo import run as run_zoo

DIGITS = Path(__file__).parents[2] / "examples/digits/pipeline"


def told(*arguments: str) -> Any:
    done = CliRunner().invoke(app, ["quantize", *arguments, "--dry-run", "--json"], catch_exceptions=False)
    return json.loads(done.stdout)


def stored(model: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in model.stored_tensors().values())


@pytest.mark.parametrize("recipe", ["rtn-w8a8", "rtn-w4a8-g64"])
def test_the_size_of_the_digits(recipe: str, tmp_path: Path) -> None:
    found = told(str(DIGITS), "--recipe", recipe, "--samples", "8", "--steps", "10")
    model = fxquant.load_pipeline(DIGITS, torch_dtype=torch.float32).transformer
    size = model.config.sample_size
    call = {"timestep": torch.tensor([500]), "class_labels": torch.tensor([1])}
    sample = torch.randn(1, model.config.in_channels, size, size)
    with torch.no_grad():
        made = fxquant.compile(model, recipe=recipe, calibrate=lambda: model(sample, **call), measure=0)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["float_bytes"] == 4 * found["parameters"]
    assert found["quantized_bytes"] == pytest.approx(stored(made), rel=0.02)
    assert found["calls"] == 10
    assert not list(tmp_path.iterdir())


def test_the_size_of_a_tiny_flux(tmp_path: Path) -> None:
    entry = next(entry for entry in ENTRIES if entry.name == "FluxTransformer2DModel" and not entry.variant)
    torch.manual_seed(0)
    model = FluxTransformer2DModel(**entry.config).eval()
    model.save_pretrained(tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text(json.dumps({"transformer": ["diffusers", "FluxTransformer2DModel"]}))
    found = told(str(tmp_path), "--recipe", "rtn-w8a8")
    made = fxquant.compile(
        model, recipe="rtn-w8a8", calibrate=lambda: run_zoo(model, entry.call(step=500)), timestep=entry.timestep
    )
    assert found["quantized_bytes"] == pytest.approx(stored(made), rel=0.05)


def test_sharded_and_bf16_folders(tmp_path: Path) -> None:
    pipe = make_pipeline(make_dit(layers=2))
    pipe.save_pretrained(tmp_path / "whole")
    pipe.to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    pipe.transformer.save_pretrained(tmp_path / "bf16" / "transformer", max_shard_size="10KB")
    for file in (tmp_path / "bf16" / "transformer").glob("diffusion_pytorch_model.safetensors"):
        file.unlink()
    assert len(list((tmp_path / "bf16" / "transformer").glob("*.safetensors"))) > 1
    whole = forecast(tmp_path / "whole", fxquant.make_recipe("rtn-w8a8"), torch.bfloat16, 1)
    sharded = forecast(tmp_path / "bf16", fxquant.make_recipe("rtn-w8a8"), torch.bfloat16, 1)
    assert sharded == whole


def test_text_and_errors(tmp_path: Path, float_folder: Path) -> None:
    done = CliRunner().invoke(app, ["quantize", str(float_folder), "--dry-run", "--recipe", "rtn-adaround-w4a8"])
    assert "nothing was loaded or written" in done.stdout
    assert "not estimated" in done.stdout
    for arguments in (["quantize", str(tmp_path), "--dry-run"], ["quantize", "a-name/of-the-hub", "--dry-run"]):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 2
        assert "local folder" in done.stderr
    done = CliRunner().invoke(app, ["quantize", str(float_folder)])
    assert done.exit_code == 2
    assert "--out is missing" in done.stderr


@pytest.mark.slow
def test_the_command_line_on_sharded_bf16_folders(tmp_path: Path) -> None:
    pipe = make_pipeline(make_dit(layers=1)).to(torch.bfloat16)
    pipe.save_pretrained(tmp_path / "bf16", max_shard_size="20KB")
    assert len(list((tmp_path / "bf16" / "transformer").glob("*.safetensors"))) > 1
    arguments = ["--recipe", "rtn-w8a8", "--samples", "2", "--steps", "2", "--dtype", "bfloat16", "--measure", "0"]
    out = tmp_path / "quantized"
    CliRunner().invoke(app, ["quantize", str(tmp_path / "bf16"), "--out", str(out), *arguments], catch_exceptions=False)
    made = fxquant.load_pipeline(out)
    assert made.transformer.dtype == torch.bfloat16
