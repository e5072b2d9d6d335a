"""Statistics on the command line: kept, used by a second conversion, and shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fxquant import Statistics
from tests.cli.test_cli import FAST, refused, run


@pytest.fixture(scope="module")
def kept(float_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    options = ("--recipe", "rtn-w8a8", "--out", folder / "first", "--keep-statistics", folder / "file", *FAST)
    result = run("quantize", float_folder, *options)
    assert result.exit_code == 0, result.output
    return folder / "file"


@pytest.mark.slow
def test_a_second_conversion(float_folder: Path, kept: Path, tmp_path: Path) -> None:
    recipe = ("--recipe", "ptq4dit-w4a8")
    result = run("quantize", float_folder, *recipe, "--out", tmp_path / "second", "--statistics", kept)
    assert result.exit_code == 0, result.output
    direct = run("quantize", float_folder, *recipe, "--out", tmp_path / "direct", *FAST)
    assert direct.exit_code == 0, direct.output
    left, right = (
        load_file(tmp_path / name / "transformer" / "diffusion_pytorch_model.safetensors")
        for name in ("second", "direct")
    )
    assert left.keys() == right.keys()
    assert all(left[name].equal(right[name]) for name in left)


def test_it_is_shown(kept: Path) -> None:
    text = run("statistics", kept).stdout
    assert "observed values" in text and "transformer_blocks.0.attn1.to_q" in text
    rows = json.loads(run("statistics", kept, "transformer_blocks.0.attn1.to_q", "--json").stdout)
    assert rows[0]["timestep"] is None and len(rows) == 1 + rows[0]["timesteps"]
    assert "transformer_blocks.0.attn1.to_q" in refused("statistics", kept, "transformer_blocks.0.attn1.to_x")


def test_files_are_merged(float_folder: Path, kept: Path, tmp_path: Path) -> None:
    other, both = tmp_path / "other", tmp_path / "both"
    made = ("--recipe", "rtn-w8a8", "--out", tmp_path / "second", "--seed", "1", "--keep-statistics", other)
    result = run("quantize", float_folder, *made, *FAST)
    assert result.exit_code == 0, result.output
    result = run("merge-statistics", kept, other, "--out", both)
    assert result.exit_code == 0, result.output
    first, second, merged = (Statistics.load(file) for file in (kept, other, both))
    assert list(merged) == list(first)
    assert merged.calls.seen == first.calls.seen + second.calls.seen
    for key, channels in merged.items():
        assert channels.maximum.equal(torch.maximum(first[key].maximum, second[key].maximum))
    assert "exists" in refused("merge-statistics", kept, other, "--out", both)
    assert "two or more" in refused("merge-statistics", kept, "--out", tmp_path / "one")
    assert "seed" in refused("merge-statistics", kept, kept, "--out", tmp_path / "same")
    assert not (tmp_path / "one").exists() and not (tmp_path / "same").exists()


def test_refusals(float_folder: Path, kept: Path, tmp_path: Path) -> None:
    command = ("quantize", float_folder, "--out", tmp_path / "out")
    assert "not both" in refused(*command, "--statistics", kept, "--keep-statistics", tmp_path / "other")
    assert "lies in --out" in refused(*command, "--keep-statistics", tmp_path / "out" / "file")
    assert "is a folder" in refused(*command, "--keep-statistics", tmp_path)
    assert "cannot read statistics" in refused(*command, "--statistics", tmp_path / "nothing")
    assert "second moments" in refused(*command, "--recipe", "ptq4dit-gptq-w4a8", "--statistics", kept)
    assert "is a folder; give the file" in refused("statistics", tmp_path)
    assert not (tmp_path / "out").exists()
