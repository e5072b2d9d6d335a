"""An interrupted search continues from what it has finished, and finds the same."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import fxquant
from fxquant.allocation import search as searching
from fxquant.allocation import speed as speeds
from fxquant.calibration.calibrate import Calibration
from fxquant.errors import ConfigurationError, FolderInUseError
from fxquant.planning import kept_weights
from fxquant.statistics.collection import Statistics
from tests.tiny import calibrate

OPTIONS: dict[str, Any] = {
    "candidates": ("w3a8", "w5a8", "w8a8"),
    "recipe": "smoothquant-gptq",
    "timesteps": 2,
    "measure": 0,
    "probes": 2,
}


class Interrupted(BaseException):
    """Stands for the end of the process."""


class Counted:
    """A function that is counted, and that the end of the process interrupts once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, stop: int | None = None) -> None:
        self.inner, self.stop, self.count = getattr(owner, name), stop, 0

        def function(*given: Any, **options: Any) -> Any:  # A function becomes a method of a class.
            return self(*given, **options)

        monkeypatch.setattr(owner, name, function)

    def __call__(self, *given: Any, **options: Any) -> Any:
        if self.count == self.stop:
            self.stop = None
            raise Interrupted
        self.count += 1
        return self.inner(*given, **options)


@pytest.mark.slow
def test_a_search_for_quality(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_weights, "WORTH_KEEPING", 0.0)
    wanted = {**OPTIONS, "sqnr": 40.0, "calibrate": calibrate(model, steps=(900, 100)), "checks": 3}
    whole = fxquant.search(model, **wanted)
    assert len(whole.checks) > 1
    measured = Counted(monkeypatch, searching, "output_sqnr", stop=1)
    computed = Counted(monkeypatch, Calibration, "compute")
    with pytest.raises(Interrupted):
        fxquant.search(model, resume=tmp_path, **wanted)
    calls = computed.count
    assert calls > 0 and measured.count == 1
    found = fxquant.search(model, resume=tmp_path, **wanted)
    assert computed.count == calls and measured.count == len(whole.checks)
    assert (found.chosen, found.checks, found.plan) == (whole.chosen, whole.checks, whole.plan)


@pytest.mark.slow
def test_a_search_for_speed(
    model: nn.Module, statistics: Statistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {**OPTIONS, "recipe": "smoothquant", "speed": 0.01, "statistics": statistics, "checks": 2}
    layers = Counted(monkeypatch, speeds, "time_layers")
    calls = Counted(monkeypatch, speeds, "time_calls", stop=0)
    with pytest.raises(Interrupted):
        fxquant.search(model, resume=tmp_path, **wanted)
    assert (layers.count, calls.count) == (1, 0)
    first = fxquant.search(model, resume=tmp_path, **wanted)
    assert layers.count == 1
    made = calls.count
    again = fxquant.search(model, resume=tmp_path, **wanted)
    assert (layers.count, calls.count) == (1, made)
    assert (again.chosen, again.times, again.plan) == (first.chosen, first.times, first.plan)


def test_two_measurements_in_one_folder(model: nn.Module, statistics: Statistics, tmp_path: Path) -> None:
    wanted = {**OPTIONS, "recipe": "smoothquant", "statistics": statistics, "resume": tmp_path}

    def second(*_: Any) -> None:
        with pytest.raises(FolderInUseError, match="another process works in"):
            fxquant.sensitivity(model, **wanted)
        raise Interrupted

    with pytest.raises(Interrupted):
        fxquant.sensitivity(model, progress=second, **wanted)


@pytest.mark.slow
def test_a_model_that_computes_something_else_is_refused(
    model: nn.Module, statistics: Statistics, tmp_path: Path
) -> None:
    """Its weights are equal; the epsilon of its norms is not."""
    options: dict[str, Any] = {"statistics": statistics, "recipe": "smoothquant", "candidates": ("w4a8", "w8a8")}
    options |= {"timesteps": 1, "measure": 0}
    fxquant.sensitivity(model, resume=tmp_path, **options)
    changed = copy.deepcopy(model)
    for part in changed.modules():
        if isinstance(part, nn.LayerNorm):
            part.eps = 0.5
    with pytest.raises(ConfigurationError, match="another model"):
        fxquant.sensitivity(changed, resume=tmp_path, **options)
