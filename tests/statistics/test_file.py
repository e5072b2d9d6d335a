"""The file of statistics: what is read back, and what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fxquant.disk import whole_file as disk
from fxquant.errors import CheckpointError, WriteError
from fxquant.schemas.statistics import StatisticsFile
from fxquant.statistics.collection import Statistics
from fxquant.statistics.kept_calls import Run
from tests.statistics.test_kept_calls import KIND

Tensors = dict[str, Tensor]
Header = dict[str, Any]


def made() -> Statistics:
    statistics = Statistics(num_rows=3, keep_calls=4)
    statistics.wants_moments = lambda key: key == "b"
    for seed, step in enumerate((900.0, 100.0)):
        torch.manual_seed(seed)
        for key in ("a", "b"):
            statistics.record(key, torch.randn(2, 4, 5), torch.tensor(step))
        priority = statistics.calls.wants(statistics.calls.kind(KIND), step)
        assert priority is not None
        statistics.calls.keep(0, step, priority, [torch.randn(3, 2)])
    statistics.run = Run("m:Model", "0" * 32, "timestep", None)
    return statistics


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made().save(tmp_path / "file")
    return tmp_path / "file"


def test_a_long_list_of_what_are_no_seeds_is_refused_at_its_first(file: Path) -> None:
    """Errors of all of them would take hundreds of MB."""
    with safe_open(file, framework="pt") as opened:
        header = json.loads(opened.metadata()["fxquant-statistics"])
    header["keys"]["a"] = [float(number) for number in range(1000)]
    with pytest.raises(ValidationError) as caught:
        StatisticsFile.model_validate(header, strict=True)
    assert [error["loc"][-2:] for error in caught.value.errors()] == [("a", 0)]


def test_everything_is_read_back(file: Path) -> None:
    before, after = made(), Statistics.load(file)
    assert after.run == before.run
    assert after.calls.kinds == before.calls.kinds
    assert after.calls.most == 4
    for left, right in zip(before.calls, after.calls, strict=True):
        assert (left.kind, left.timestep, left.number, left.priority) == (
            right.kind, right.timestep, right.number, right.priority)  # fmt: skip
        assert all(map(torch.equal, left.inputs, right.inputs))
    assert after.table() == before.table()
    assert after.table("b") == before.table("b")


def test_recording_of_calls_continues(file: Path) -> None:
    """The next calls get the priorities that they would have got without the file."""
    before, after = made().calls, Statistics.load(file).calls
    assert [before.wants(0, 5.0) for _ in range(3)] == [after.wants(0, 5.0) for _ in range(3)]


def edited(path: Path, change: Callable[[Header, Tensors], object]) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    header = json.loads(metadata["fxquant-statistics"])
    change(header, tensors)
    save_file(tensors, path, metadata={"fxquant-statistics": json.dumps(header)})


HOSTILE: dict[str, Callable[[Header, Tensors], object]] = {
    "rows: greater than or equal": lambda h, t: h.update(num_rows=-1),
    "keys": lambda h, t: h.update(keys=["a"]),
    "kind 7, but there are 1": lambda h, t: h["calls"][0].update(kind=7),
    "has 2 inputs, and its kind has 1": lambda h, t: h["calls"][0]["inputs"].append("call:0"),
    "finite number": lambda h, t: h["calls"][0].update(timestep=float("nan")),
    "priority": lambda h, t: h["calls"][0].update(priority=3.0),
    "no such entry": lambda h, t: h["run"].update(weight="x"),
    "pattern": lambda h, t: h["run"].update(weights="../x"),
    "number of each input once": lambda h, t: h["kinds"][0]["structure"].update(dict={}),
    "call:9": lambda h, t: h["calls"][0].update(inputs=["call:9"]),
    "input of a kept call is": lambda h, t: t.update({"call:0": torch.zeros(3, 2, dtype=torch.int32)}),
    "has shape": lambda h, t: t.update({"call:0": torch.zeros(3, 9)}),
    "minimum is above": lambda h, t: t["a.minimum"].fill_(99),
    "maximum is not finite": lambda h, t: t["a.maximum"].fill_(torch.inf),
    "timesteps are not ascending": lambda h, t: t["a.timesteps"].fill_(1.0),
    "count is not positive": lambda h, t: t["a.count"].fill_(0),
    "priority is negative": lambda h, t: t["a.priorities"].fill_(-1),
    "row is not finite": lambda h, t: t["a.rows"].fill_(torch.nan),
    # Would allocate half of 10^18 numbers.
    "do not fit together": lambda h, t: t.update(
        {"b.moment_sums": torch.zeros(0, 10**9), "b.moment_timesteps": torch.zeros(0, dtype=torch.float64)}
    ),
    "second moment is not finite": lambda h, t: t["b.moments"].fill_(torch.nan),
}


@pytest.mark.parametrize("message", HOSTILE)
def test_hostile_files(file: Path, message: str) -> None:
    edited(file, HOSTILE[message])
    with pytest.raises(CheckpointError) as caught:
        Statistics.load(file)
    assert str(file) in str(caught.value)
    assert message.rpartition(": ")[2] in str(caught.value)


def test_a_failed_save_leaves_the_earlier_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk.os, "replace", full)
    with pytest.raises(WriteError, match="No space left"):
        made().save(file)
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


def test_a_folder_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="is a folder"):
        made().save(tmp_path)


def test_an_error_names_the_file_also_if_its_name_is_short(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file({}, "e", metadata={"fxquant-statistics": "[]"})
    with pytest.raises(CheckpointError, match="cannot read statistics from e: "):
        Statistics.load("e")
