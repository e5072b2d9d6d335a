"""Conversions in several precisions share the factorized second moments and the rounded weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxquant
from fxquant.numerics.rounding.feedback import ErrorFeedback
from fxquant.planning.roundings import Roundings
from fxquant.statistics.collection import Statistics
from tests.tiny import calibrate

CANDIDATES = ("w3a8", "w4a8-g4", "w8a8")


@pytest.fixture(scope="module")
def recorded(model: nn.Module) -> Statistics:
    found = Statistics(keep_calls=6)
    fxquant.compile(model, recipe="smoothquant-gptq-w8a8", calibrate=calibrate(model), statistics=found)
    return found


@pytest.mark.slow
def test_each_input_is_factorized_once(model: nn.Module, recorded: Statistics, monkeypatch: pytest.MonkeyPatch) -> None:
    factorized = []
    of = ErrorFeedback.of.__func__  # type: ignore[attr-defined]

    def counted(cls: type[ErrorFeedback], *args: object, **options: bool) -> ErrorFeedback:
        factorized.append(args)
        made: ErrorFeedback = of(cls, *args, **options)
        return made

    monkeypatch.setattr(ErrorFeedback, "of", classmethod(counted))
    options = {"recipe": "smoothquant-gptq", "candidates": CANDIDATES, "timesteps": 1, "measure": 0, "probes": 1}
    # 8 bits everywhere do not fit, so that the choice is a mix.
    found = fxquant.search(model, size=0.355, statistics=recorded, **options)  # type: ignore[arg-type]
    once = len(factorized)
    fxquant.compile(model, recipe="smoothquant-gptq-w8a8", statistics=recorded, measure=0)
    assert once == len(factorized) - once  # As many as one conversion needs.
    assert recorded.roundings is None  # A later conversion holds nothing.
    alone = fxquant.compile(model, plan=found.plan, statistics=recorded, measure=0)
    tensors = alone.state_dict()
    assert len(set(found.chosen.values())) > 1
    for name, tensor in found.model.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name


def test_weights_with_other_factors_are_rounded_anew(model: nn.Module, recorded: Statistics) -> None:
    with Roundings(lambda plan, name: []).used_with(recorded):
        fxquant.compile(model, recipe="smoothquant-gptq-w4a8", statistics=recorded, measure=0)
        shared = fxquant.compile(model, recipe="ptq4dit-gptq-w4a8", statistics=recorded, measure=0)
    alone = fxquant.compile(model, recipe="ptq4dit-gptq-w4a8", statistics=recorded, measure=0).state_dict()
    for name, tensor in shared.state_dict().items():
        assert torch.equal(tensor, alone[name]), name
