"""The command ``fxquant balance``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiTPipeline
from typer.testing import CliRunner, Result

from fxquant.cli.__main__ import app
from fxquant.export.weights import IN_PLACE
from tests.tiny import run as output

FAST = ("--samples", "2", "--steps", "3")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_writes_an_ordinary_pipeline(float_folder: Path, tmp_path: Path) -> None:
    result = run("balance", float_folder, "--out", tmp_path / "balanced", *FAST)
    assert result.exit_code == 0, result.output
    assert "attn1.to_q" in result.stdout and "parameters changed" in result.stdout
    assert "a float pipeline that diffusers reads" in result.stderr.replace("\n", " ")
    assert [path.name for path in tmp_path.iterdir()] == ["balanced"]
    before, after = (
        DiTPipeline.from_pretrained(folder).transformer for folder in (float_folder, tmp_path / "balanced")
    )
    assert {k: v.shape for k, v in before.state_dict().items()} == {k: v.shape for k, v in after.state_dict().items()}
    name = "transformer_blocks.0.attn1.to_q.weight"
    assert not torch.equal(before.state_dict()[name], after.state_dict()[name])
    assert (output(before) - output(after)).abs().max() < 1e-5
    names = [
        {path.name for path in (folder / "transformer").iterdir()} for folder in (float_folder, tmp_path / "balanced")
    ]
    assert names[0] == names[1]


def test_prints_json(float_folder: Path, tmp_path: Path) -> None:
    result = run("balance", float_folder, "--out", tmp_path / "b", "--json", "--recipe", "repq-w8a8", *FAST)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["transformer"]
    assert any(layer["shifted"] for layer in found["layers"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--recipe", "rtn-w8a8"), "balances nothing"),
        (("--recipe", "no-w8a8"), "unknown recipe 'no'"),
    ],
)
def test_refuses(options: tuple[str, ...], message: str, float_folder: Path, tmp_path: Path) -> None:
    result = run("balance", float_folder, "--out", tmp_path / "b", *options, *FAST)
    assert result.exit_code == 2 and message in result.stderr.replace("\n", " ")
    assert not list(tmp_path.iterdir())


def test_replaces_nothing(float_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("keep")
    result = run("balance", float_folder, "--out", tmp_path, *FAST)
    assert result.exit_code == 2 and "exists" in result.stderr
    assert (tmp_path / "mine").read_text() == "keep"


# --- files for other tools ---


@pytest.mark.slow
def test_exports_in_the_layout_of_another_tool(float_folder: Path, tmp_path: Path) -> None:
    recipe = IN_PLACE.replace("precision=w8a8", "precision=w8a16")
    made = run("quantize", float_folder, "--recipe", recipe, "--out", tmp_path / "q", "--measure", "0", *FAST)
    assert made.exit_code == 0, made.output
    forms = {
        "comfyui": ("diffusion_model.safetensors", ("--names", "class")),
        "compressed-tensors": ("config.json", ()),
        "int8": ("config.json", ("--original", str(float_folder))),
    }
    for name, (file, options) in forms.items():
        result = run("export", tmp_path / "q", tmp_path / name, "--format", name, *options)
        assert result.exit_code == 0, result.output
        assert f"{name}: " in result.stdout and (tmp_path / name / file).is_file()
    for options, message in (
        (("--format", "comfyui"), "--names class"),
        (("--format", "int8", "--names", "class"), "--names is for --format comfyui"),
        (("--aot", "--names", "class"), "--names is for --format comfyui"),
        (("--format", "onnx", "--original", str(float_folder)), "--original is for forms that hold only weights"),
    ):
        result = run("export", tmp_path / "q", tmp_path / "refused", *options)
        assert result.exit_code == 2 and message in " ".join(result.stderr.split()), result.output
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "pass --aot to compile"),
        (("--aot", "--format", "onnx"), "pass --aot to compile"),
        (("--format", "onnx", "--overwrite"), "--overwrite are for --aot"),
    ],
)
def test_export_refuses_contradictions(options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    result = run("export", tmp_path, tmp_path / "out", *options)
    assert result.exit_code == 2 and message in result.stderr.replace("\n", " ")
