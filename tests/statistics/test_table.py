"""What observers recorded, as people read it."""

from __future__ import annotations

import json

import pytest
import torch

from fxquant.errors import UnknownNameError
from fxquant.statistics.collection import Statistics


@pytest.fixture
def statistics() -> Statistics:
    found = Statistics()
    for step, scale in ((900.0, 1.0), (100.0, 3.0)):
        x = torch.tensor([[[1.0, -2.0, 10.0], [0.5, 1.0, -4.0]]]) * scale
        found.record("block.to_q", x, torch.tensor(step))
    found.record("block.ff", torch.ones(1, 4, 2), torch.tensor(900.0))
    return found


def test_rows_hold_the_recorded_numbers(statistics: Statistics) -> None:
    whole, first, second = statistics.rows("block.to_q")
    assert (whole.low, whole.high, whole.absmax_median, whole.absmax_max) == (-12.0, 30.0, 6.0, 30.0)
    assert (whole.timesteps, whole.channels, whole.count, whole.widest, whole.moves) == (2, 3, 4, 2, 3.0)
    assert (first.timestep, first.low, first.high, first.count, first.moves) == (100.0, -12.0, 30.0, 2, None)
    assert (second.timestep, second.low, second.high) == (900.0, -4.0, 10.0)
    assert [row.key for row in statistics.rows()] == ["block.to_q", "block.ff"]
    json.dumps([row.to_json() for row in statistics.rows()], allow_nan=False)


def test_text(statistics: Statistics) -> None:
    text = statistics.table()
    assert text.startswith("2 observed values, 2 timesteps, 0 calls kept")
    line = next(line for line in text.splitlines() if line.startswith("block.to_q"))
    assert line.split() == ["block.to_q", "2", "3", "4", "-12", "30", "6", "30", "2", "3.00x"]
    assert [line.split()[0] for line in statistics.table("block.to_q").splitlines()[4:]] == ["all", "100", "900"]


def test_an_unknown_layer_names_similar_ones(statistics: Statistics) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown observed value 'block\.to_k'.*block\.to_q"):
        statistics.table("block.to_k")


def test_nothing_recorded() -> None:
    assert Statistics().table().startswith("0 observed values")
