"""Commands on a pipeline with two experts, whose files are of one variant and whose output has sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel
from typer.testing import CliRunner

import fxquant
from fxquant.cli.__main__ import app
from fxquant.errors import CalibrationError
from fxquant.runtime.model import GraphModel

SIZES = ("--height", 16, "--width", 16, "--num-frames", 5)
SHORT = ("--samples", 2, "--steps", 4, "--measure", 0)


def make_wan() -> WanPipeline:
    """A Wan 2.2 pipeline with random weights, for clips of 16 x 16 pixels."""
    torch.manual_seed(0)
    options = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 32, "freq_dim": 32, "ffn_dim": 32}
    experts = [WanTransformer3DModel(**options, num_layers=1, rope_max_seq_len=32).eval() for _ in range(2)]
    vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "fox": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
    config = UMT5Config(vocab_size=8, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    encoder = UMT5EncoderModel(config).eval()
    pipe = WanPipeline(tokenizer, encoder, vae, UniPCMultistepScheduler(flow_shift=3.0), *experts, boundary_ratio=0.5)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan") / "float"
    make_wan().save_pretrained(folder, variant="fp16")
    return folder


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.slow
def test_balances_two_experts_of_a_variant(wan: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox\n")
    arguments = (wan, "--variant", "fp16", "--prompts", prompts, "--samples", 2, "--steps", 4, "--measure", 1, *SIZES)
    done = run("balance", *arguments, "--out", tmp_path / "b", "--json")
    assert done.exit_code == 0, done.output
    assert list(json.loads(done.stdout)) == ["transformer", "transformer_2"]
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "b")
    assert isinstance(pipe.transformer, WanTransformer3DModel) and isinstance(pipe.transformer_2, WanTransformer3DModel)


@pytest.mark.slow
def test_two_experts_of_a_variant(wan: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox\n")
    arguments = (wan, "--variant", "fp16", "--prompts", prompts, "--recipe", "rtn-w8a8", *SHORT, *SIZES)
    parts = "transformer,transformer_2,text_encoder=rtn-w4a16"
    done = run("quantize", *arguments, "--components", parts, "--out", tmp_path / "q", "--json")
    assert done.exit_code == 0, done.output
    reports = json.loads(done.stdout)
    assert list(reports) == ["transformer", "transformer_2", "text_encoder"]
    assert reports["text_encoder"]["totals"]["layers_by_precision"].keys() == {"w4a16", "float"}

    loaded = fxquant.load_pipeline(tmp_path / "q")
    assert type(loaded.text_encoder) is GraphModel
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "q").text_encoder) is GraphModel
    early, late = loaded.transformer.plan, loaded.transformer_2.plan
    assert min(early.timesteps) >= 500 > max(late.timesteps), "each expert is calibrated on the timesteps that it sees"

    done = run("generate", tmp_path / "q", "--prompts", "a fox", "--steps", 2, *SIZES, "--out", tmp_path / "clip.gif")
    assert done.exit_code == 0, done.output
    with Image.open(tmp_path / "clip.gif") as clip:
        assert (clip.size, clip.n_frames) == ((16, 16), 5)


def test_mistakes(wan: Path, tmp_path: Path, float_folder: Path) -> None:
    out = ("--out", tmp_path / "q")
    for arguments, said in (
        ((wan, *out), "It holds files of another variant; give variant='fp16' (--variant fp16)"),
        ((wan, *out, "--variant", "bf16"), "give variant='fp16'"),
        ((wan, *out, "--variant", "fp16", "--components", "unet"), "part 'unet' of this WanPipeline is not there"),
        (
            (wan, *out, "--variant", "fp16", "--components", "tokenizer"),
            "is not a model; it has text_encoder, tr",
        ),
        ((wan, *out, "--components", "transformer,transformer"), "give transformer once"),
        ((float_folder, *out, "--components", "transformer,vae", "--attribute"), "--attribute is about one part"),
        ((float_folder, *out, "--components", "vae", "--attribute"), "each part of a VAE is one"),
        ((float_folder, *out, "--components", "vae", "--recipe", "htg-w8a8", *SHORT), "the model has no timestep"),
        ((float_folder, *out, "--components", "vae.decoder"), "part 'vae.decoder' of this DiTPipeline is not there"),
        ((float_folder, *out, "--height", 64), "DiTPipeline has no option height: its output has one size"),
    ):
        done = run("quantize", *arguments)
        assert done.exit_code != 0
        assert said in " ".join(done.output.split()), done.output
    assert not list(tmp_path.iterdir())


def test_a_part_that_is_quantized_already(tmp_path: Path) -> None:
    """Whatever its dtype is."""
    (tmp_path / "pipe" / "transformer").mkdir(parents=True)
    (tmp_path / "pipe" / "transformer" / "plan.json").write_text("{}")
    for options in (("--dry-run",), ("--out", tmp_path / "q")):
        done = run("quantize", tmp_path / "pipe", *options)
        assert done.exit_code != 0
        assert "was made by fxquant; give the original float pipeline" in " ".join(done.output.split())


@pytest.mark.slow
def test_one_run_for_all_parts(wan: Path) -> None:
    pipe = make_wan()
    experts = pipe.transformer, pipe.transformer_2
    runs = []

    def calibrate(steps: int = 4) -> None:
        runs.append(steps)
        pipe("fox", height=16, width=16, num_frames=5, num_inference_steps=steps, output_type="latent")

    options: dict[str, Any] = {"recipe": "rtn-w8a8", "measure": 0}
    with pytest.raises(CalibrationError, match="without calling the model"):
        fxquant.compile_pipeline(pipe, calibrate=lambda: calibrate(1), **options)  # The second expert is not called.
    assert (pipe.transformer, pipe.transformer_2) == experts
    made = fxquant.compile_pipeline(pipe, calibrate=calibrate, **options)
    assert runs == [1, 4]
    assert (pipe.transformer, pipe.transformer_2) == tuple(made.values())
    assert all(type(part) is GraphModel for part in made.values())


@pytest.mark.slow
def test_a_vae(float_folder: Path, tmp_path: Path) -> None:
    """Calibration decodes, and the folder is a pipeline like any other."""
    out = tmp_path / "q"
    parts = ("--components", "transformer,vae=rtn-w8a8", "--recipe", "rtn-w8a16", "--dump", tmp_path / "graphs")
    done = run("quantize", float_folder, *parts, "--out", out, *SHORT, "--json")
    assert done.exit_code == 0, done.output
    reports = json.loads(done.stdout)
    assert list(reports) == ["transformer", "vae.decoder"]
    assert reports["vae.decoder"]["totals"]["layers_by_precision"].keys() == {"w8a8"}
    assert all(any((tmp_path / "graphs" / name).iterdir()) for name in reports)
    assert type(fxquant.load_pipeline(out).vae.decoder) is GraphModel

    done = run("report", out / "vae" / "decoder")
    assert done.exit_code == 0 and "AutoencoderKL/decoder" in done.output
    done = run("report", out)
    assert f"name one: {out / 'transformer'}, {out / 'vae' / 'decoder'}" in done.output.replace("\n", "")
    done = run("generate", out, "--labels", "1,2", "--steps", 2, "--out", tmp_path / "grid.png")
    assert done.exit_code == 0, done.output
