"""Error attribution on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fxquant
from tests.cli.test_cli import FAST, refused, run
from tests.tiny import make_pipeline

BAD = "transformer_blocks.0.attn1.to_v"


@pytest.fixture(scope="module")
def folder(float_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline in which one layer has 2 bits, with its statistics; errors were attributed at conversion."""
    place = tmp_path_factory.mktemp("attributed")
    recipe = str(fxquant.make_recipe("rtn-w8a8").with_options("assign-precision", overrides=f"{BAD}=w2a8"))
    options = ("--recipe", recipe, "--out", place / "dit", "--keep-statistics", place / "file", "--attribute", *FAST)
    result = run("quantize", float_folder, *options)
    assert result.exit_code == 0, result.output
    assert f"worst layer: {BAD}" in result.stdout
    return place


def test_it_is_kept_and_reported(folder: Path) -> None:
    assert (folder / "dit" / "transformer" / "errors.json").is_file()
    assert f"worst layer  {BAD} at timestep" in run("report", folder / "dit").stdout


@pytest.mark.parametrize("with_statistics", [True, False])
def test_one_command_names_the_worst_layer_and_timestep(
    folder: Path,
    float_folder: Path,
    with_statistics: bool,
) -> None:
    inputs = ("--statistics", folder / "file") if with_statistics else ()
    result = run("attribute", folder / "dit", float_folder, "--steps", "2", "--measure", "1", *inputs)
    assert result.exit_code == 0, result.output
    assert f"worst layer and timestep: {BAD} at" in result.stdout
    assert "kept in" in result.stderr
    plan = fxquant.Plan.load(folder / "dit" / "transformer")
    assert plan.attribution is not None and plan.attribution.worst(1)[0].name == BAD
    assert len(plan.attribution.timesteps) == 2
    assert fxquant.load(folder / "dit" / "transformer").plan == plan


def test_json_and_nothing_kept(folder: Path, float_folder: Path) -> None:
    kept = folder / "dit" / "transformer" / "errors.json"
    before = kept.read_bytes()
    options = ("--statistics", folder / "file", "--steps", "1", "--measure", "0", "--no-save", "--json")
    data = json.loads(run("attribute", folder / "dit", float_folder, *options).stdout)
    assert data["worst"][0]["layer"] == BAD
    assert len(data["timesteps"]) == 1
    assert kept.read_bytes() == before


def test_refusals(folder: Path, float_folder: Path, tmp_path: Path) -> None:
    assert "there is no folder" in refused("attribute", tmp_path / "nothing", float_folder)
    assert "cannot read statistics" in refused(
        "attribute", folder / "dit", float_folder, "--statistics", tmp_path / "x"
    )
    other = make_pipeline()
    other.transformer.proj_out_2.weight.data += 0.01
    other.save_pretrained(tmp_path / "other")
    command = ("attribute", folder / "dit", tmp_path / "other", "--statistics", folder / "file")
    assert "other weights" in refused(*command)
