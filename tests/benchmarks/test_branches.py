"""The benchmark of branches of low rank: its systems, and the ratios in its table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import branches
from fxquant.backends.native import machine
from fxquant.pipeline.recipes import make_recipe


def test_a_recipe_without_branches_is_otherwise_the_same() -> None:
    recipe = make_recipe("svdquant-w8a8")
    without = branches.without_branches(recipe)
    assert [step.name for step in recipe.convert if step not in without.convert] == ["split-low-rank"]
    assert without.prepare == recipe.prepare


def test_every_system_is_called_in_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = [0.0], []

    def system(name: str, seconds: float) -> None:
        calls.append(name)
        clock[0] += seconds

    monkeypatch.setattr(branches.time, "process_time", lambda: clock[0])
    systems = {"without": lambda: system("without", 1.0), "fused": lambda: system("fused", 1.25)}
    times = branches.interleaved(systems, 3)
    assert times == {"without": [1.0] * 3, "fused": [1.25] * 3}
    assert calls == ["without", "without", "fused", "fused"] * 3


@pytest.mark.slow
@pytest.mark.skipif(machine.missing_kernels() is not None, reason="there are no compiled kernels here")
@pytest.mark.filterwarnings("ignore")
def test_the_command_writes_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out" / "found.json"
    given = ["--model", "tiny", "--rank", "8", "--pairs", "2", "--mode", "eager", "--recipe", "svdquant-w8a8"]
    monkeypatch.setattr(sys, "argv", ["branches", *given, "--json", str(path)])
    branches.main()
    found = json.loads(path.read_text(encoding="utf-8"))
    systems = ["without, eager", "fused, eager", "separate, eager"]
    assert [cost["system"] for cost in found] == systems
    assert found[0]["ratio"] == 1.0
    assert all(cost["low"] <= cost["ratio"] <= cost["high"] and cost["ms"] > 0 for cost in found)
    printed = capsys.readouterr().out
    assert all(f"| svdquant-w8a8 | {system} |" in printed for system in systems)
