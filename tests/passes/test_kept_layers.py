"""Rounded layers and branches of low rank are kept one by one, and taken only where they belong."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import ResumeWarning
from fxquant.passes import _rounders, split_low_rank
from fxquant.pipeline.recipes import make_recipe
from fxquant.planning import kept_weights
from fxquant.runtime.model import GraphModel
from fxquant.statistics.collection import Statistics
from tests.tiny import calibrate, make_dit, run


class Interrupted(BaseException):
    """Stands for the end of the process."""


@pytest.fixture(autouse=True)
def all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_weights, "WORTH_KEEPING", 0.0)


def recipe(name: str) -> Any:
    made = make_recipe(name)
    return made.with_options("split-low-rank", rank=2) if name.startswith("svdquant") else made


def compiled(model: nn.Module, name: str, statistics: Statistics | None = None, **options: Any) -> GraphModel:
    calls = calibrate(model, steps=(900, 100))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxquant.QualityWarning)
        return fxquant.compile(model, recipe=recipe(name), calibrate=calls, statistics=statistics, measure=0, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "owner", "method"),
    [
        ("rtn-gptq-w4a8", _rounders.GPTQ, "quantize"),
        ("rtn-adaround-w4a8", _rounders.AdaRound, "quantize"),
        ("svdquant-w4a4", split_low_rank.SplitLowRank, "_fitted"),
    ],
)
def test_each_layer_is_computed_once(
    name: str, owner: type, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_dit()
    whole = compiled(model, name)
    layers: list[str] = []
    compute, stops = getattr(owner, method), [2, 4]

    def counted(self: Any, layer: Any, *given: Any) -> Any:
        if stops and len(layers) == stops[0]:
            del stops[0]
            raise Interrupted
        found = compute(self, layer, *given)
        layers.append(getattr(layer, "name", layer))
        return found

    monkeypatch.setattr(owner, method, counted)
    for _ in range(2):
        with pytest.raises(Interrupted):
            compiled(model, name, resume=tmp_path)
    resumed = compiled(model, name, resume=tmp_path)
    assert len(layers) == len(set(layers)) > 4
    assert torch.equal(run(resumed, seed=3), run(whole, seed=3))
    assert resumed.plan == whole.plan
    weights = {key: value for key, value in resumed.stored_tensors().items()}
    assert all(torch.equal(value, weights[key]) for key, value in whole.stored_tensors().items())


def test_layers_of_other_options_are_not_used(tmp_path: Path) -> None:
    model = make_dit()
    compiled(model, "rtn-gptq-w4a8", resume=tmp_path)
    other = make_recipe("rtn-gptq-w4a8").with_options("quantize-linears", damping=0.1)
    calls = calibrate(model, steps=(900, 100))
    with pytest.warns(ResumeWarning, match="differs in options of rounding"):
        found = fxquant.compile(model, recipe=other, calibrate=calls, measure=0, resume=tmp_path)
    whole = fxquant.compile(model, recipe=other, calibrate=calls, measure=0)
    assert torch.equal(run(found, seed=3), run(whole, seed=3))


def test_a_damaged_layer_is_rounded_anew(tmp_path: Path) -> None:
    model = make_dit()
    whole = compiled(model, "rtn-gptq-w4a8", resume=tmp_path)
    path = sorted((tmp_path / "rounding").iterdir())[1]
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.warns(ResumeWarning, match=f"{path.name} is damaged"):
        again = compiled(model, "rtn-gptq-w4a8", resume=tmp_path)
    assert torch.equal(run(again, seed=3), run(whole, seed=3))


def test_layers_that_take_no_time_have_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_weights, "WORTH_KEEPING", 1e9)
    compiled(make_dit(), "rtn-gptq-w4a8", resume=tmp_path)
    assert not (tmp_path / "rounding").exists()


def test_weights_that_a_plan_has_rounded_are_kept_too(tmp_path: Path) -> None:
    model, statistics = make_dit(), Statistics()
    first = compiled(model, "rtn-gptq-w4a8", statistics)
    again = fxquant.compile(model, plan=first.plan, statistics=statistics, resume=tmp_path)
    assert len(list((tmp_path / "rounding").iterdir())) > 4
    assert torch.equal(run(again, seed=3), run(first, seed=3))
