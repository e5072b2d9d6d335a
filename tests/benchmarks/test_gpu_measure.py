"""The measurement on GPUs in steps: what is kept, what is left, the budget, the targets and the carried wheels."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from packaging.requirements import Requirement
from torch import nn

from benchmarks.gpu import measure, prepare, wheels, whole
from benchmarks.gpu.agenda import DIT_2, DIT_16, FLUX, REHEARSED, Step, agenda, next_step
from benchmarks.gpu.job import Job
from benchmarks.gpu.ledger import Entry, Ledger, attempts, latest, seconds_of
from benchmarks.gpu.modes import Mode, runner
from benchmarks.gpu.session import Row, Session
from benchmarks.gpu.summary import row_of, summary
from benchmarks.gpu.systems import BF16, Made, System
from benchmarks.gpu.table import row_to_json
from benchmarks.gpu.targets import judge
from benchmarks.gpu.tune import tune
from benchmarks.models import task_of
from fxquant.backends.native.gpu.configs import Config

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "results.jsonl")


class TestLedger:
    def test_a_line_that_was_cut_off_costs_nothing_else(self, ledger: Ledger) -> None:
        ledger.add("test", "a", outcome="passed")
        with ledger.path.open("a") as file:
            file.write('{"kind": "test", "name": "b", "outc')
        ledger.add("test", "c", outcome="failed")
        assert [entry["name"] for entry in ledger.read()] == ["a", "c"]

    def test_what_never_ends_is_counted(self, ledger: Ledger) -> None:
        for kind, name in (("begin", "a"), ("begin", "b"), ("row", "b"), ("begin", "a"), ("ran", "s"), ("ran", "s")):
            ledger.add(kind, name, seconds=2.5)
        assert attempts(ledger.read()) == {"a": 2}
        assert seconds_of(ledger.read(), "s") == 5.0


class TestOrder:
    def test_models_are_begun_before_the_caps_are_exceeded(self) -> None:
        names = [step.name for step in agenda(rehearse=False)]
        assert names == ["tests of kernels", "tuning", "models", "other device tests", "whole graphs"]
        caps = sum(step.cap or 0.0 for step in agenda(rehearse=False))
        assert caps < 330 / 2

    def test_a_step_that_used_its_time_comes_after_the_others(self) -> None:
        first, second = Step("first", "tests", cap=80.0), Step("second", "models")
        ran: list[Entry] = [{"kind": "ran", "name": "first", "seconds": 30.0}]
        assert next_step([first, second], []) == (first, 80.0)
        assert next_step([first, second], ran) == (first, 50.0)
        ran.append({"kind": "ran", "name": "first", "seconds": 50.0})
        assert next_step([first, second], ran) == (second, float("inf"))
        ran.append({"kind": "step", "name": "second", "state": "finished"})
        assert next_step([first, second], ran) == (first, float("inf"))
        assert next_step([first, second], ran, ["first"]) is None


def _rows(task: str, *found: tuple[str, float, int]) -> list[Entry]:
    """Rows of a made-up report: names, milliseconds and bytes; the first one is the reference."""
    return [
        {
            "kind": "row",
            "name": f"{task}: {name}",
            "task": task,
            "reference": found[0][0],
            "rehearsed": False,
            "row": row_to_json(
                Row(name, None, False, 30.0, [1e-3 * ms] * 3, [found[0][1] / ms] * 3, 1.0, size, 2 * size)
            ),
        }
        for name, ms, size in found
    ]


class TestTargets:
    def test_each_is_judged_with_the_fastest_rows(self) -> None:
        entries = [
            *_rows(
                DIT_16,
                ("bf16, compiled blocks, CUDA graph", 10.0, 1000),
                ("bf16, compiled blocks", 9.0, 1000),
                ("native W8A8 int8, compiled blocks", 6.5, 520),
                ("native W8A8 fp8, compiled blocks, CUDA graph", 5.0, 520),
                ("torchao int8 dynamic, compiled blocks", 5.25, 520),
                ("native W4A8, compiled blocks", 6.0, 310),
                ("native W4A8-g64, compiled blocks", 1.0, 1),
            ),
            *_rows(
                DIT_2,
                ("bf16, compiled blocks, CUDA graph", 2.0, 1000),
                ("native W8A8 int8, compiled blocks", 1.0, 520),
                ("native W8A8 int8, compiled blocks, CUDA graph", 1.9, 520),
            ),
        ]
        said = {it.target: (it.passed, it.said) for it in judge(entries)}
        assert len(said) == 9
        assert said[f"{DIT_16}: W8A8 or fp8 at least 1.5 x compiled bf16"] == (True, "pass: 1.800")
        assert said[f"{DIT_16}: W8A8 or fp8 at least 1.1 x the fastest torchao"] == (False, "short by 0.050: 1.050")
        assert said[f"{DIT_16}: weights of W4A8 at most 0.30 of bf16"] == (False, "short by 0.010: 0.310")
        assert said[f"{DIT_16}: W4A8 at least 0.85 x the speed of W8A8"] == (True, "pass: 1.083")
        two = f"{DIT_2}: W8A8 or fp8 with CUDA graphs at least 1.1 x compiled bf16"
        assert said[two] == (False, "short by 0.047: 1.053")
        assert all(it == (None, "not measured") for name, it in said.items() if name.startswith(FLUX))

    def test_rows_with_several_references_are_compared_by_their_times(self) -> None:
        one = _rows(DIT_16, ("bf16, compiled blocks, CUDA graph", 10.0, 1000))
        other = _rows(DIT_16, ("bf16, compiled blocks", 16.0, 1000), ("native W8A8 fp8, compiled blocks", 4.0, 500))
        assert judge([*one, *other])[0].found == pytest.approx(2.5)

    def test_rows_that_failed_do_not_count(self) -> None:
        entries = _rows(DIT_16, ("bf16, compiled blocks", 9.0, 1), ("native W8A8 int8, compiled blocks", 1.0, 1))
        entries[1]["row"]["failed"] = "Wrong"
        assert judge(entries)[0].said == "not measured"

    def test_the_page_has_targets_rows_and_failed_tests(self) -> None:
        entries = _rows(DIT_16, ("bf16, compiled blocks", 9.0, 10**6))
        entries.append({"kind": "test", "name": "t.py::t", "outcome": "failed", "text": "E  assert 1 == 2"})
        page = summary(entries, agenda(rehearse=False))
        assert "| bf16, compiled blocks |" in page and "1 failed" in page and "E  assert 1 == 2" in page
        assert "rehearsal" not in page.lower() and "not measured" in page
        entries[0]["rehearsed"] = True
        assert "No number below is one of a GPU's speed" in summary(entries, agenda(rehearse=True))

    def test_rows_come_back_from_json(self) -> None:
        row = Row("a", sqnr_db=float("inf"), seconds=[1.0])
        assert row_of(json.loads(json.dumps(row_to_json(row)))) == row


class TestModels:
    def test_what_is_measured_is_not_measured_again(self, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
        """A first run ends in a system that kills its process each time; later runs go on behind it."""
        task = REHEARSED[2]
        made: list[str] = []

        def making(name: str, broken: bool = False) -> System:
            def make(job: Job) -> nn.Module:
                made.append(name)
                if broken:
                    raise KeyboardInterrupt
                return BF16.make(job)

            return System(Made(name, make, 25.0), Mode.EAGER)

        systems = [making("bf16"), making("second"), making("kills", broken=True), making("last")]
        monkeypatch.setattr(whole, "systems_of", lambda task: systems)

        def run(seconds: float) -> bool:
            return whole.measure_tasks([task], ledger, CPU, time.monotonic() + seconds, rehearse=True)

        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                run(1000.0)
        assert not run(-1.0)
        assert made == ["bf16", "second", "kills", "bf16", "kills"]
        assert run(1000.0) and run(1000.0)
        assert made[5:] == ["bf16", "last"]
        rows = {entry["row"]["system"].split(",")[0]: entry["row"] for entry in latest(ledger.read(), "row").values()}
        assert rows["kills"]["failed"] == "the process ended each of the 2 times that it was begun"
        assert all(rows[name]["failed"] is None and rows[name]["seconds"] for name in ("bf16", "second", "last"))

    def test_a_package_that_arrives_later_is_measured_then(self) -> None:
        there, lacks = (System(Made(name, BF16.make, 25.0, ("torch",)), Mode.EAGER) for name in ("bf16", "theirs"))
        rows = [
            {"kind": "row", "name": whole.name_in(REHEARSED[0], system.name), "row": {"failed": failed}}
            for system, failed in ((there, None), (lacks, "torchao is not installed"))
        ]
        assert whole.to_measure(REHEARSED[0], [there, lacks], rows) == (there, [lacks])
        rows[1]["row"] = {"failed": "too old"}
        assert whole.to_measure(REHEARSED[0], [there, lacks], rows) == (there, [])

    def test_the_second_reference_takes_the_place_of_one_that_failed(self) -> None:
        first, second = (System(BF16, mode) for mode in (Mode.BLOCKS_GRAPH, Mode.BLOCKS))
        rows = [{"kind": "row", "name": whole.name_in(REHEARSED[0], first.name), "row": {"failed": "no"}}]
        assert whole.to_measure(REHEARSED[0], [first, second], rows) == (second, [second])

    def test_blocks_that_are_alike_are_compiled_once(self) -> None:
        class Blocks(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

            def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
                for block in self.blocks:
                    x = block(x)
                return (x,)

        model, call = Blocks(), {"x": torch.randn(4, 8)}
        right = model(**call)[0]
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        for _ in range(2):
            assert torch.equal(runner(model, Mode.BLOCKS, call, "eager")(), right)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        with pytest.raises(ValueError, match="Linear has no list of blocks"):
            runner(nn.Linear(8, 8), Mode.BLOCKS, {}, "eager")

    def test_a_kept_module_is_made_once(self) -> None:
        made: list[Job] = []

        def make(job: Job) -> nn.Module:
            made.append(job)
            return BF16.make(job)

        kept: whole.Kept = {}
        for batch in (2, 4):
            systems = [System(Made("ours", make, 25.0), Mode.EAGER)]
            session = Session(Job(task_of("tiny:1", batch), CPU), 0, lambda: False, lambda rows: None, kept=kept)
            assert session.measure(systems)[0].failed is None
        assert len(made) == 1


def test_tuning_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu.tune._fastest", lambda kind, *rest: Config(16, 32))
    out, seen = tmp_path / "table.json", list[str]()

    def run(stop: int) -> None:
        tune([(20, 64, 48), (40, 64, 48)], CPU, "some", lambda run: 1.0, out, list(seen),
             lambda entry, config: seen.append(entry), lambda: len(seen) >= stop)  # fmt: skip
        assert set(json.loads(out.read_text())) == set(seen)

    run(3)
    assert len(seen) == 3
    run(100)
    assert len(seen) == len(set(seen)) == 8


class Steps(measure.Measurement):
    """Steps that run a line of Python instead of their own work."""

    def __init__(self, folder: Path, seconds: float, code: str) -> None:
        super().__init__(folder, rehearse=True, end=time.monotonic() + seconds)
        self._code = code

    def _start(self, step: Step, deadline: float, log: IO[str]) -> subprocess.Popen[bytes]:
        code = f"name = {step.name!r}; path = {str(self.ledger.path)!r}; {self._code}"
        return subprocess.Popen([sys.executable, "-Sc", code], stdout=log, stderr=log, start_new_session=True)


class TestRuns:
    FINISH = """open(path, "a").write('{"kind": "step", "name": "' + name + '", "state": "finished"}\\n')"""

    @pytest.fixture(autouse=True)
    def _quick(self, monkeypatch: pytest.MonkeyPatch, ledger: Ledger) -> None:
        monkeypatch.setattr(measure, "_LEAST_SECONDS", 0.3)
        ledger.path.touch()

    def test_all_steps_run_once(self, tmp_path: Path, ledger: Ledger) -> None:
        assert Steps(tmp_path, 60.0, self.FINISH).run() == 0
        ran = [entry["name"] for entry in ledger.read() if entry["kind"] == "ran"]
        assert ran == [step.name for step in agenda(rehearse=True)]
        assert Steps(tmp_path, 60.0, "raise SystemExit(5)").run() == 0
        assert len([entry for entry in ledger.read() if entry["kind"] == "ran"]) == len(ran)

    def test_the_budget_ends_a_step(self, tmp_path: Path, ledger: Ledger) -> None:
        began = time.monotonic()
        assert Steps(tmp_path, 1.5, "import time; time.sleep(100)").run() == measure.TIME_LEFT
        assert time.monotonic() - began < 30
        assert [entry["name"] for entry in ledger.read()] == ["tests of kernels"]

    def test_a_step_that_crashes_is_repeated_and_then_left_out(self, tmp_path: Path, ledger: Ledger) -> None:
        assert Steps(tmp_path, 60.0, "raise SystemExit(9)").run() == measure.TIME_LEFT
        ran = [entry["name"] for entry in ledger.read() if entry["kind"] == "ran"]
        assert ran[:5] == ["tests of kernels"] * 4 + ["tuning"] and len(ran) == 4 * len(agenda(rehearse=True))
        assert "pytest ended with status 9" in (tmp_path / "summary.md").read_text()


class TestBadInput:
    @pytest.fixture
    def main(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
        def call(*arguments: str) -> str:
            monkeypatch.setattr(sys, "argv", ["measure", *arguments])
            with pytest.raises(SystemExit) as raised:
                measure.main()
            assert raised.value.code == 2
            return capsys.readouterr().err

        return call

    def test_no_gpu(self, main: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert "no NVIDIA GPU here" in main(str(tmp_path / "out")) and not (tmp_path / "out").exists()

    def test_missing_packages(self, main: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(measure, "_found", lambda name: name != "diffusers")
        assert "not installed here: diffusers. Collect wheels" in main(str(tmp_path / "out"), "--rehearse")

    def test_results_of_another_device(self, main: Callable[..., str], ledger: Ledger) -> None:
        ledger.add("run", "NVIDIA H100", rehearsed=False)
        before = ledger.read()
        assert "has results of NVIDIA H100" in main(str(ledger.path.parent), "--rehearse")
        assert ledger.read() == before

    def test_a_folder_that_is_a_file(self, main: Callable[..., str], tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        assert "results cannot be written" in main(str(tmp_path / "file"), "--rehearse")
        assert "not possible" in main(str(tmp_path / "out"), "--rehearse", "--budget", "0")


def _wheel(folder: Path, name: str, version: str, *requires: str) -> Path:
    path = folder / f"{name}-{version}-py3-none-any.whl"
    lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {it}" for it in requires)]
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join(lines) + "\n")
    return path


class TestWheels:
    def test_only_what_is_missing_or_too_old_is_installed(self, tmp_path: Path) -> None:
        _wheel(tmp_path, "models", "2.0", "hub>=1,<3", "numbers>=2", 'other; extra == "more"')
        _wheel(tmp_path, "numbers", "2.5")
        _wheel(tmp_path, "hub", "2.9", "something")
        carried = prepare.read(tmp_path)
        present = {"hub": "1.5", "numbers": "1.0"}
        chosen, missing = prepare.choose([Requirement("models>=1"), Requirement("absent")], present, carried)
        assert [wheel.path.name.split("-")[0] for wheel in chosen] == ["models", "numbers"]
        assert [str(it) for it in missing] == ["absent"]
        _, missing = prepare.choose([Requirement("numbers>=3")], present, carried)
        assert [str(it) for it in missing] == ["numbers>=3"]

    def test_damaged_and_double_wheels_are_refused(self, tmp_path: Path) -> None:
        _wheel(tmp_path, "models", "2.0")
        _wheel(tmp_path, "models", "2.1")
        with pytest.raises(prepare.Damaged, match="two wheels of models"):
            prepare.read(tmp_path)
        (tmp_path / "models-2.1-py3-none-any.whl").write_bytes(b"cut off")
        with pytest.raises(prepare.Damaged, match=r"models-2\.1.* is not a wheel"):
            prepare.read(tmp_path)

    def test_packages_of_the_machine_are_never_collected(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        new, folder = tmp_path / "new", tmp_path / "folder"
        new.mkdir()
        names = ("models", "torch", "triton", "nvidia_cublas_cu13", "torchao", "Pillow")
        found = wheels.place([_wheel(new, name, "1.0") for name in names], folder, ("pillow",))
        assert [path.name.split("-")[0] for path in found] == ["models", "torchao"]
        monkeypatch.setattr(wheels, "MOST_BYTES", 10)
        with pytest.raises(wheels.NoWheels, match="MiB"):
            wheels.place([_wheel(new, "models", "2.0")], folder, ())
        assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in found)
