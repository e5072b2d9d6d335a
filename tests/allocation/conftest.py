"""A model, and what one calibration of it recorded."""

from __future__ import annotations

import pytest
from torch import nn

import fxquant
from fxquant.statistics.collection import Statistics
from tests.tiny import calibrate, make_dit


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return make_dit()


@pytest.fixture(scope="module")
def statistics(model: nn.Module) -> Statistics:
    found = Statistics(keep_calls=6)
    fxquant.compile(model, recipe="smoothquant-w8a8", calibrate=calibrate(model), statistics=found)
    return found
