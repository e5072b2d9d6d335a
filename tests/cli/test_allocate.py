"""The commands ``fxquant sensitivity`` and ``fxquant search``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fxquant
from fxquant.cli.__main__ import app
from fxquant.planning.plan import PLAN_FILE
from tests.tiny import make_pipeline

QUICK = ("--samples", "1", "--steps", "2", "--timesteps", "1", "--probes", "1", "--recipe", "rtn")
CANDIDATES = ("--candidates", "w4a8,w8a8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("pipeline") / "dit"
    make_pipeline().save_pretrained(found)
    return found


@pytest.fixture(scope="module")
def run() -> Callable[..., str]:
    def invoke(*arguments: object, code: int = 0) -> str:
        result = CliRunner().invoke(app, list(map(str, arguments)))
        assert result.exit_code == code, result.output
        return result.output

    return invoke


@pytest.mark.slow
def test_measure_search_and_load(folder: Path, run: Callable[..., str], tmp_path: Path) -> None:
    file, out = tmp_path / "dit.sensitivities", tmp_path / "mixed"
    text = run("sensitivity", folder, "--out", file, "--measure", 0, *QUICK, *CANDIDATES)
    assert "all layers" in text and "w4a8" in text and str(file) in text.replace("\n", "")
    known = fxquant.Sensitivities.load(file)
    share = (known.uniform_bytes("w4a8") + known.uniform_bytes("w8a8")) / 2 / known.bytes_before
    options = ("--sensitivities", file, "--size", share, "--out", out, "--picture", tmp_path / "pareto.svg", "--json")
    text = run("search", folder, *options, *QUICK)
    found = json.loads(text[text.index("{") : text.rindex("}") + 1])
    assert found["point"]["size"] <= share * known.bytes_before
    plan = fxquant.Plan.load(out / "transformer")
    chosen = {name: choice["precision"] for name, choice in found["choices"].items()}
    assert {name: str(plan.layers[name].precision) for name in chosen} == chosen
    assert fxquant.load(out / "transformer") is not None
    assert (tmp_path / "pareto.svg").read_text().startswith("<?xml")


@pytest.mark.slow
def test_times_are_kept_for_a_speed(folder: Path, run: Callable[..., str], tmp_path: Path) -> None:
    """The reference ops are slower than float, so the speed is below 1."""
    options = ("--speed", 0.001, "--times", tmp_path / "dit.times", "--json")
    texts = [run("search", folder, *options, *QUICK, *CANDIDATES) for _ in range(2)]
    first, second = (json.loads(text[text.index("{") : text.rindex("}") + 1]) for text in texts)
    assert first["choices"] == second["choices"] and first["times"] == second["times"]
    assert first["times"] == {
        name: value for name, value in json.loads((tmp_path / "dit.times").read_text()).items() if name != "format"
    }
    assert 0.001 < first["point"]["speed"] < 1 and "times faster than float, measured" in first["cost_model"]


def test_what_is_refused(folder: Path, run: Callable[..., str], tmp_path: Path) -> None:
    assert "exactly one of size" in run("search", folder, *QUICK, code=2)
    assert "choose one of these suffixes" in run("search", folder, "--size", 0.5, "--picture", "a.txt", code=2)
    assert "the smallest has" in run("search", folder, "--size", 0.001, *QUICK, *CANDIDATES, code=2).replace("\n", " ")
    (tmp_path / "other").write_text("{}")
    assert "other" in run("search", folder, "--size", 0.5, "--sensitivities", tmp_path / "other", code=2)


def test_what_cannot_be_written_is_refused_before_anything_is_read(run: Callable[..., str], tmp_path: Path) -> None:
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "mine").write_text("mine")
    file.write_text("mine")
    nothing = tmp_path / "no-pipeline"

    def said(*arguments: object) -> str:
        return run(*arguments, code=2).replace("\n", " ")

    assert f"{full} exists; choose another folder" in said("search", nothing, "--size", 0.5, "--out", full)
    assert "--picture" in said("search", nothing, "--size", 0.5, "--out", full / "a", "--picture", full / "a" / "b.svg")
    assert "--times" in said("search", nothing, "--speed", 2, "--times", full)
    assert "cannot be written" in said("search", nothing, "--size", 0.5, "--resume", file / "a")
    assert "nope" in said("search", nothing, "--size", 0.5, "--backend", "nope")
    assert "--out" in said("sensitivity", nothing, "--out", full)
    assert "cannot be written" in said("sensitivity", nothing, "--out", file / "a")
    (nothing / "transformer").mkdir(parents=True)
    (nothing / "transformer" / PLAN_FILE).write_text("{}")
    assert "give the original float pipeline" in said("search", nothing, "--size", 0.5)
    assert "give the original float pipeline" in said("sensitivity", nothing)


@pytest.mark.slow
def test_a_search_keeps_finished_timesteps(folder: Path, run: Callable[..., str], tmp_path: Path) -> None:
    options = ("search", folder, "--size", 0.5, *QUICK, *CANDIDATES, "--resume", tmp_path / "unfinished", "--json")
    first, second = (
        json.loads(text[text.index("{") : text.rindex("}") + 1]) for text in (run(*options), run(*options))
    )
    assert first["choices"] == second["choices"] and (tmp_path / "unfinished" / "sensitivities.json").is_file()
