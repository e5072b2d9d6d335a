"""Dumps after every change, and reproducers that really reproduce."""

from __future__ import annotations

import importlib
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import fxquant
from fxquant.cli.__main__ import app
from fxquant.errors import CalibrationError, PassError, WriteError
from fxquant.ir.dumps import dump_of, load_dump
from fxquant.ir.printing import graph_text
from fxquant.ir.stages import Stage
from fxquant.pipeline.dumps import DumpGraphs, Reproducer, write_dump
from fxquant.pipeline.pipeline import PASSES, Pass, Pipeline
from fxquant.pipeline.recipes import Recipe
from fxquant.planning.plan import Plan
from tests.pipeline.test_pipeline import Step, module, plan
from tests.tiny import calibrate, make_dit, run

_FAILING = "tests.pipeline.failing"


@pytest.fixture
def fails_at() -> Iterator[Callable[..., Pass]]:
    """A pass of the tests, registered for one test: other tests run over all registered passes."""
    yield importlib.import_module(_FAILING).FailsAt
    PASSES._objects.pop("test-fails-at")
    del sys.modules[_FAILING]


def command(line: str) -> Result:
    """Run a command line in this process."""
    program, *arguments = shlex.split(line)
    assert program == "fxquant"
    return CliRunner().invoke(app, arguments)


def texts(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.txt"))


def test_what_cannot_be_written_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    graph = module()
    (tmp_path / "file").touch()
    (tmp_path / "graph.json").mkdir()
    for path, named in (("file/graph", "graph.txt"), ("graph", "graph.json")):
        with pytest.raises(WriteError, match=named):
            write_dump(tmp_path / path, dump_of(graph, Stage.CAPTURED), graph_text(graph), plan())
    write_dump(tmp_path / "new" / "graph", dump_of(graph, Stage.CAPTURED), graph_text(graph), plan())
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "graph.json", "graph.plan", "graph.safetensors", "graph.txt"
    ]  # fmt: skip


def test_graphs_are_dumped_after_each_change(tmp_path: Path) -> None:
    folder = tmp_path / "graphs"
    with pytest.raises(PassError):
        Pipeline([Step(), Step("double"), Step("crash")], [DumpGraphs(folder)]).run(module(), plan())
    assert texts(folder) == ["00-captured", "01-step", "02-step-failed"]
    assert "clone(" not in (folder / "00-captured.txt").read_text()
    assert "= clone(transpose)  # by step" in (folder / "01-step.txt").read_text()
    for name in ("00-captured", "01-step"):
        read, graph = load_dump(folder / name)
        assert graph_text(graph, notes=True) + "\n" == (folder / f"{name}.txt").read_text()
        assert read.stage == "captured"


@pytest.mark.slow
def test_a_variable_dumps_all_graphs_of_a_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXQUANT_DUMP", str(tmp_path))
    model = make_dit()

    def both() -> None:
        calibrate(model)()
        run(model, size=4)

    fxquant.compile(model, recipe="ptq4dit-w8a8", calibrate=both, measure=0)
    expected = ["captured", "remove-no-ops", "balance-channels", "absorb-affines", "quantize-linears"]
    expected += ["quantize-embeddings", "lowered-to-fake-quant"]
    for folder in (tmp_path, tmp_path / "graph-1"):
        assert texts(folder) == [f"{number:02d}-{name}" for number, name in enumerate(expected)]
    assert Plan.load(tmp_path / "02-balance-channels.plan").vectors
    before = command(f"fxquant opt {tmp_path}/02-balance-channels --passes absorb-affines --notes")
    assert before.exit_code == 0, before.output
    assert before.stdout == (tmp_path / "03-absorb-affines.txt").read_text()
    assert "absorb-affines: " in before.stderr


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="file cannot be written: File exists"):
        DumpGraphs(tmp_path / "file")


def test_a_failing_pass_leaves_a_reproducer_that_fails_in_the_same_way(
    tmp_path: Path, fails_at: Callable[..., Pass]
) -> None:
    model, folder = make_dit(), tmp_path / "failures"
    recipe = fxquant.make_recipe("rtn-w8a8")
    recipe = Recipe(recipe.prepare, (*recipe.convert, fails_at()))
    with pytest.raises(PassError, match="ZeroDivisionError: at silu_1_codes") as error:
        fxquant.compile(model, recipe=recipe, calibrate=calibrate(model), measure=0, instruments=[Reproducer(folder)])
    (note,) = error.value.__notes__
    line = note.partition("to run the pass on it again: ")[2]
    assert line == f"fxquant opt {folder}/test-fails-at.json --passes test-fails-at --import tests.pipeline.failing"
    again = command(line)
    assert again.exit_code == 2
    assert "pass test-fails-at failed: ZeroDivisionError: at silu_1_codes" in again.stderr.replace("\n", "")
    written = (folder / "test-fails-at.txt").read_text().splitlines()
    assert written[:2] == ["# failed with: ZeroDivisionError('at silu_1_codes')", f"# {line}"]


def test_what_was_missing_is_missing_again(tmp_path: Path) -> None:
    model = make_dit()
    made = fxquant.compile(model, recipe="rtn-w8a8", calibrate=calibrate(model), measure=0).plan
    undecided = made.undecided("remove-no-ops,assign-precision ; quantize-linears")
    with pytest.raises(CalibrationError, match="there are no calibration statistics") as error:
        fxquant.compile(make_dit(), plan=undecided, instruments=[Reproducer(tmp_path)])
    line = next(note for note in error.value.__notes__ if "again: " in note).partition("again: ")[2]
    again = command(line)
    assert again.exit_code == 2
    assert "there are no calibration statistics" in again.stderr.replace("\n", " ")


def test_statistics_are_kept_so_that_decisions_are_made_again(tmp_path: Path, fails_at: Callable[..., Pass]) -> None:
    model = make_dit()
    recipe = fxquant.make_recipe("ptq4dit-w8a8")
    recipe = Recipe(recipe.prepare, (recipe.convert[0], fails_at("_balanced")))
    with pytest.raises(PassError):
        fxquant.compile(model, recipe=recipe, calibrate=calibrate(model), measure=0, instruments=[Reproducer(tmp_path)])
    stem = tmp_path / "test-fails-at"
    result = command(f"fxquant opt {stem} --passes quantize-linears --json")
    assert result.exit_code == 0, result.output
    assert '"fxquant::linear"' in result.stdout


def test_a_pipeline_that_works_leaves_none(tmp_path: Path) -> None:
    Pipeline([Step("double")], [Reproducer(tmp_path / "failures")]).run(module(), plan())
    assert not (tmp_path / "failures").exists()
