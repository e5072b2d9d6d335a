"""``fxquant quantize --dry-run``: compared with real conversions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel, FluxTransformer2DModel
from typer.testing import CliRunner

import fxquant
from fxquant.cli.__main__ import app
from fxquant.errors import ConfigurationError
from fxquant.inspect.forecast import bytes_beside, forecast, forecast_of_part
from fxquant.storage.agreement import Header
from tests.cli.test_components import make_wan
from tests.tiny import calibrate, make_dit, make_pipeline
from tests.zoo.models import ENTRIES
from tests.zoo.test_zoo import run as run_zoo

DIGITS = Path(__file__).parents[2] / "examples/digits/pipeline"


def told(*arguments: str) -> Any:
    done = CliRunner().invoke(app, ["quantize", *arguments, "--dry-run", "--json"], catch_exceptions=False)
    return json.loads(done.stdout)


def stored(model: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in model.stored_tensors().values())


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [pytest.param("rtn-w8a8", marks=pytest.mark.exhaustive), "rtn-w4a8-g64"])
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


@pytest.mark.parametrize("recipe", ["svdquant-w4a8-g16", "svdquant-rotated-w4a4", "auto-w4a8", "svdquant-w4a16"])
def test_branches_count(recipe: str) -> None:
    model = make_dit(layers=2)
    made = fxquant.compile(model, recipe=_narrow(recipe), calibrate=calibrate(model, (500,)), measure=0)
    tensors = {name: Header("float32", tuple(tensor.shape)) for name, tensor in model.named_parameters()}
    plain = forecast_of_part(tensors, fxquant.make_recipe("rtn-w4a8"), torch.float32, "diffusers")
    found = forecast_of_part(tensors, _narrow(recipe), torch.float32, "diffusers")
    assert found["quantized_bytes"] == pytest.approx(stored(made), rel=0.02)
    assert found["quantized_bytes"] > 1.1 * plain["quantized_bytes"]
    assert found["convert_seconds"] is None


def _narrow(recipe: str) -> fxquant.Recipe:
    return fxquant.make_recipe(recipe).with_options("split-low-rank", rank=6, iterations=0)


def test_a_recipe_without_precisions_is_refused() -> None:
    recipe = fxquant.Recipe.parse("remove-no-ops ; quantize-linears")
    with pytest.raises(ConfigurationError, match="no pass assign-precision"):
        forecast_of_part({"a.weight": Header("float32", (4, 4))}, recipe, torch.float32, "diffusers")


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
    whole = forecast(tmp_path / "whole", {"transformer": fxquant.make_recipe("rtn-w8a8")}, torch.bfloat16, 1)
    sharded = forecast(tmp_path / "bf16", {"transformer": fxquant.make_recipe("rtn-w8a8")}, torch.bfloat16, 1)
    assert sharded == whole


@pytest.mark.parametrize(
    ("recipe", "blocks", "seconds", "peak"),
    [
        ("rtn-w8a8", 28, 6.6, 4.84),
        ("ptq4dit-w8a8", 4, 2.5, 1.43),
        ("ptq4dit-w8a8", 14, 8.7, 3.44),
        ("ptq4dit-w8a8", 28, 25.5, 6.29),
        ("ptq4dit-w8a8", 56, 43.1, 11.72),
        ("ptq4dit-w4a8", 28, 26.8, 6.16),
        ("ptq4dit-gptq-w4a8", 28, 172, 7.88),
    ],
)
def test_time_and_memory_of_dit_xl(recipe: str, blocks: int, seconds: float, peak: float) -> None:
    """As measured in benchmarks/results/convert.md, in seconds and GB."""
    with torch.device("meta"):
        model = DiTTransformer2DModel(num_layers=blocks, sample_size=32, out_channels=8)
    tensors = {name: Header("float32", tuple(tensor.shape)) for name, tensor in model.named_parameters()}
    chosen = fxquant.make_recipe(recipe)
    part = forecast_of_part(tensors, chosen, torch.float32, "diffusers")
    assert part["convert_seconds"] == pytest.approx(seconds, rel=0.35)
    assert 0.65 + (part["float_bytes"] + bytes_beside(chosen, part)) / 1e9 == pytest.approx(peak, rel=0.3)


def test_several_parts(tmp_path: Path) -> None:
    """Two experts and a text encoder, whose embedding of tokens stays float; of two variants one counts."""
    make_wan().save_pretrained(tmp_path / "wan")
    make_wan().save_pretrained(tmp_path / "wan", variant="fp16")
    arguments = (str(tmp_path / "wan"), "--recipe", "rtn-w8a8")
    both = told(*arguments, "--components", "transformer,transformer_2=ptq4dit-w4a8,text_encoder=rtn-w8a16")
    alone = told(*arguments)
    parts = both["components"]
    assert list(parts) == ["transformer", "transformer_2", "text_encoder"]
    assert parts["transformer"] == alone["components"]["transformer"]
    assert parts["transformer_2"]["quantized_bytes"] < parts["transformer"]["quantized_bytes"]
    assert both["quantized_bytes"] == sum(part["quantized_bytes"] for part in parts.values())
    assert both["peak_bytes"] > alone["peak_bytes"]
    done = CliRunner().invoke(app, ["quantize", *arguments, "--components", "transformer,unet", "--dry-run"])
    assert done.exit_code == 2
    assert "parts that it holds: " in done.stderr and "transformer_2" in done.stderr
    text = CliRunner().invoke(app, ["quantize", *arguments, "--components", "transformer,transformer_2", "--dry-run"])
    assert "quantized transformer_2" in text.stdout


def test_a_vae(float_folder: Path) -> None:
    """All layers of its decoder are counted, and nothing of its encoder."""
    vae = AutoencoderKL.from_pretrained(float_folder, subfolder="vae")
    latents = torch.zeros(1, 4, 8, 8)
    made = fxquant.compile_parts(vae, recipe="rtn-w8a16", calibrate=lambda: vae.decode(latents), measure=0)
    found = told(str(float_folder), "--components", "vae", "--recipe", "rtn-w8a16")
    assert found["quantized_bytes"] == pytest.approx(made.get_memory_footprint(), rel=0.02)


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
