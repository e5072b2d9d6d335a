"""Seconds an image: the pipeline runs the system, and failures are listed. No test looks at a time."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks.cpu import images
from benchmarks.cpu.rounds import NO_TIME, Failed, Settings, Stores
from benchmarks.cpu.systems import REFERENCE, Stored, System
from benchmarks.models import task_of


def test_the_pipeline_calls_the_system_in_every_step() -> None:
    task, calls = task_of("tiny:1"), []
    model = task.model()

    def run(call):
        calls.append(call)
        return model(**call)[0]

    found = images.measured(task, run, steps=3, images=2)
    assert len(found["seconds"]) == 2
    assert 0 < found["transformer"] < sum(found["seconds"])
    assert len(calls) == 1 + 2 * 3
    assert {tuple(call["hidden_states"].shape) for call in calls} == {(2, 4, 8, 8)}
    assert calls[-1]["class_labels"].tolist() == [2, 1000]


def test_the_system_decides_the_image() -> None:
    task = task_of("tiny:1")
    made = []
    for scale in (1.0, 1.0, 0.5):
        model = task.model()
        pipe = images.pipeline_of(task, lambda call, m=model, s=scale: s * m(**call)[0])
        generator = torch.Generator().manual_seed(0)
        made.append(pipe(class_labels=[1], num_inference_steps=2, generator=generator, output_type="np").images)
    assert (made[0] == made[1]).all()
    assert (made[0] != made[2]).any()


def test_only_a_dit() -> None:
    with pytest.raises(ValueError, match="with a DiT alone"):
        images.pipeline_of(task_of("tiny-flux:1+1"), lambda call: call)


def test_what_cannot_be_made_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(*_: object, **__: object) -> None:
        raise Failed("its process ended with -9")

    monkeypatch.setattr(images, "Process", ended)
    stores = Stores(Settings("tiny:1", 2, 1, 1, 1), tmp_path)
    found = images._one(stores, System("a", lambda task, folder: None), 2)
    assert found == {"failed": "its process ended with -9"}
    text = images.table([{"system": REFERENCE, "seconds": [3.0], "transformer": 2.0}, {"system": "a"} | found])
    assert f"| {REFERENCE} |" in text
    assert text.endswith("Not measured:\n\n- a: its process ended with -9")


def test_nothing_is_started_when_the_time_is_used_up(tmp_path: Path) -> None:
    stores = Stores(Settings("tiny:1", 2, 1, 1, 1, until=time.monotonic() - 1), tmp_path)
    assert images._one(stores, System("a", lambda task, folder: None), 2) == {"failed": NO_TIME}


def test_files_of_systems_are_made_once(tmp_path: Path) -> None:
    stores = Stores(Settings("tiny:1", 2, 1, 1, 1), tmp_path)
    stores._failures["shared"] = "no such op"
    with pytest.raises(Failed, match="no such op"):
        stores.folder(System("a", lambda task, folder: None, Stored("shared", lambda task, folder: None)))
    assert stores.folder(System("b", lambda task, folder: None)) == ""


def test_ratios_are_those_of_the_medians() -> None:
    rows = [
        {"system": REFERENCE, "seconds": [4.0, 8.0, 6.0], "transformer": 5.0},
        {"system": "fast", "seconds": [2.0], "transformer": 1.0},
    ]
    assert images.table(rows).splitlines()[-1].replace(" ", "") == "|fast|2.00|1.00|3.00|"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--system", "nothing"], "unknown system 'nothing'; known: eager fp32"),
        (["--model", "ddt:2"], "is not a model"),
    ],
)
def test_wrong_arguments(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        images.main(arguments)
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    path = tmp_path / "images.json"
    images.main(["--model", "tiny:1", "--steps", "1", "--system", REFERENCE, "--threads", "1", "--json", str(path)])
    (row,) = json.loads(path.read_text())["rows"]
    assert row["system"] == REFERENCE
    assert len(row["seconds"]) == 1
