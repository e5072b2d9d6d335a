"""Precisions for a speed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxquant
from fxquant.allocation import speed as searching
from fxquant.allocation.timing import Timed, time_layers
from fxquant.errors import BackendError, CheckpointError, ConfigurationError, SpeedWarning, UnreachableTargetError
from fxquant.pipeline.backend import resolve_backend
from fxquant.planning.layer_times import LayerTimes
from fxquant.planning.sensitivities import Sensitivities
from fxquant.statistics.collection import Statistics
from tests.tiny import calibrate

CANDIDATES = ("w3a8", "w5a8", "w8a8")
MS = {"w3a8": 1.0, "w5a8": 2.0, "w8a8": 4.0}
"""Milliseconds per layer in the tests whose times are given."""
FLOAT_CALL = 60.0
REST = 10.0


@pytest.fixture(scope="module")
def known(model: nn.Module, statistics: Statistics) -> Sensitivities:
    options: dict[str, Any] = {"recipe": "smoothquant", "timesteps": 1, "measure": 0, "probes": 4}
    return fxquant.sensitivity(model, statistics=statistics, candidates=CANDIDATES, **options)


@pytest.fixture
def table(known: Sensitivities) -> LayerTimes:
    layers = {name: {text: MS[text] for text in one.precisions} for name, one in known.layers.items()}
    return LayerTimes("a table", "fake-quant", 4, FLOAT_CALL, REST, layers)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Calls take what the table says, times a factor, and beside their layers a rest that the search does not know."""
    told: dict[str, Any] = {"factor": 1.0, "rest": REST, "calls": 0}

    def time_calls(
        model: nn.Module, quantized: fxquant.GraphModel, arguments: Mapping[str, Any], device: torch.device
    ) -> tuple[float, float]:
        told["calls"] += 1
        assert quantized.plan is not None
        texts = [str(layer.precision) for layer in quantized.plan.layers.values()]
        return FLOAT_CALL, told["factor"] * (told["rest"] + sum(MS.get(text, 0.0) for text in texts))

    def time_layers(
        wanted: list[Timed], backend: Any, dtype: torch.dtype, device: torch.device
    ) -> dict[Timed, tuple[float, float]]:
        return {one: (0.0, MS[one.precision]) for one in wanted}

    monkeypatch.setattr(searching, "time_calls", time_calls)
    monkeypatch.setattr(searching, "time_layers", time_layers)
    return told


@pytest.mark.slow
def test_a_speed_is_that_of_a_whole_call(
    model: nn.Module, statistics: Statistics, known: Sensitivities, table: LayerTimes, clock: dict[str, Any]
) -> None:
    result = fxquant.search(model, speed=2, sensitivities=known, statistics=statistics, times=table)
    spent = sum(MS[text] for text in result.chosen.values())
    assert FLOAT_CALL / 2 - MS["w5a8"] < REST + spent <= FLOAT_CALL / 2
    assert result.point.speed == pytest.approx(FLOAT_CALL / (REST + spent))
    assert result.times is table
    assert "times faster than float, measured" in str(result) and "a table" in str(result)
    again = fxquant.search(model, speed=2, sensitivities=known, statistics=statistics, times=table)
    assert again.plan == result.plan


@pytest.mark.slow
def test_the_rest_is_measured_and_corrected_and_the_file_repeats_the_choice(
    model: nn.Module, statistics: Statistics, known: Sensitivities, clock: dict[str, Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    clock["factor"] = 1.25  # Layers take longer in the model than by themselves: the first choice is too slow.
    options: dict[str, Any] = {"sensitivities": known, "statistics": statistics, "times": tmp_path / "times"}
    result = fxquant.search(model, speed=2, **options)
    spent = 1.25 * (REST + sum(MS[text] for text in result.chosen.values()))
    assert FLOAT_CALL / 2 * 0.85 < spent <= FLOAT_CALL / 2 / 0.99
    speeds = [FLOAT_CALL / 1.25 / (REST + len(known.layers) * MS["w3a8"]), result.point.speed]
    assert 2 * 0.99 <= speeds[1] < speeds[0]
    assert result.checks[0].speed == pytest.approx(speeds[0]) and result.point in result.checks
    assert clock["calls"] > 2  # The fastest, one that is too slow, and a corrected one.
    monkeypatch.setattr(searching, "time_layers", None)
    again = fxquant.search(model, speed=2, **options)
    assert again.plan == result.plan and again.times == LayerTimes.load(tmp_path / "times") == result.times


def test_a_speed_that_cannot_be_reached(
    model: nn.Module, statistics: Statistics, known: Sensitivities, table: LayerTimes, clock: dict[str, Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    most = FLOAT_CALL / (REST + len(known.layers) * MS["w3a8"])
    options: dict[str, Any] = {"sensitivities": known, "statistics": statistics}
    with pytest.raises(UnreachableTargetError, match=r"times is the most, measured\. Give speed=3\.\d+, ") as said:
        fxquant.search(model, speed=9, times=tmp_path / "times", **options)
    assert said.value.best == pytest.approx(most)
    assert LayerTimes.load(tmp_path / "times").rest == pytest.approx(REST)
    with pytest.raises(UnreachableTargetError, match="by the times that are given") as said:
        fxquant.search(model, speed=9, times=table, **options)
    assert said.value.best == pytest.approx(most)


def test_times_that_do_not_hold_here_are_told(
    model: nn.Module, statistics: Statistics, known: Sensitivities, table: LayerTimes, clock: dict[str, Any]
) -> None:
    clock["factor"] = 2.0
    with pytest.warns(SpeedWarning, match=r"a call is 1 times faster than float, measured, and 2 by the times"):
        fxquant.search(model, speed=2, sensitivities=known, statistics=statistics, times=table)


@pytest.mark.slow
def test_a_table_of_other_layers_or_of_another_backend(
    model: nn.Module, statistics: Statistics, known: Sensitivities, table: LayerTimes, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"sensitivities": known, "statistics": statistics}
    name = next(iter(known.layers))
    table.layers[name].pop("w5a8")  # type: ignore[attr-defined]
    with pytest.raises(ConfigurationError, match=f"do not hold layer '{name}' in w5a8"):
        fxquant.search(model, speed=2, times=table, **options)
    with pytest.raises(ConfigurationError, match="of backend 'fake-quant', and this search is for 'native'"):
        fxquant.search(model, speed=2, times=table, backend="native", **options)
    with pytest.raises(ConfigurationError, match="for a speed only"):
        fxquant.search(model, size=0.3, times=table, **options)
    with pytest.raises(ConfigurationError, match="path of a file of them"):
        fxquant.search(model, speed=2, times=3, **options)
    table.save(tmp_path / "times")
    data = json.loads((tmp_path / "times").read_text())
    for change, message in (({"format": 2}, "newer fxquant"), ({"float_call": 0}, "float_call")):
        (tmp_path / "times").write_text(json.dumps({**data, **change}))
        with pytest.raises(CheckpointError, match=message):
            fxquant.search(model, speed=2, times=tmp_path / "times", **options)
    with pytest.raises(CheckpointError, match="does not exist"):
        LayerTimes.load(tmp_path / "other")


def test_layers_are_timed_as_the_backend_lowers_them() -> None:
    cells = [
        Timed(64, (96, 256), "w8a8", False, 0),
        Timed(64, (96, 256), "w8a8", True, 4),
        Timed(2048, (96, 256), "float", False, 0),
        Timed(8, (96, 256), "float", False, 0),
    ]
    before = torch.get_rng_state()
    found = time_layers([*cells, cells[0]], resolve_backend("fake-quant"), torch.float32, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    assert list(found) and set(found) == set(cells)
    for cell, (shared, own) in found.items():
        assert shared >= 0 and own > 0
        assert cell.precision != "float" or shared == 0
    large, small = (sum(found[cell]) for cell in cells[2:])
    assert large > 2 * small  # 256 times the work.


@pytest.mark.slow
def test_precisions_that_the_backend_does_not_run_are_left_out(model: nn.Module) -> None:
    options: dict[str, Any] = {"recipe": "smoothquant", "timesteps": 1, "measure": 0, "probes": 1}
    collected = Statistics(keep_calls=3)
    candidates = ("w8a8", "w4a8-g8", "float")
    onednn = "native{kernels=onednn}"
    result = fxquant.search(
        model, size=0.9, backend=onednn, calibrate=calibrate(model), statistics=collected, candidates=candidates,
        **options,
    )  # fmt: skip
    assert set(result.chosen.values()) <= {"w8a8", "float"}
    assert "not considered: w4a8-g8 in" in str(result)
    assert "w4a8-g8" in result.sensitivities.precisions
    known = fxquant.sensitivity(model, statistics=collected, candidates=("w4a8-g8",), **options)
    with pytest.raises(BackendError, match="in none of the candidates w4a8-g8: its weight has one grid per 8"):
        fxquant.search(model, size=0.9, backend=onednn, sensitivities=known, statistics=collected)
