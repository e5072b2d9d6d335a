"""The transformers of a pipeline are balanced in one run of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fxquant
from fxquant.errors import CalibrationError, ConfigurationError
from tests.test_two_experts import clip, pipeline


@pytest.mark.slow
def test_one_run_balances_both_experts() -> None:
    pipe, runs = pipeline(), []
    experts = pipe.transformer, pipe.transformer_2
    expected = clip(pipe, seed=1)
    made: dict[str, Any] = fxquant.balance_pipeline(pipe, calibrate=lambda: runs.append(clip(pipe)))
    assert len(runs) == 1 and list(made) == ["transformer", "transformer_2"]
    assert (pipe.transformer, pipe.transformer_2) == experts
    assert torch.equal(clip(pipe, seed=1), expected)  # The pipeline did not change.
    for name, model in made.items():
        before = dict(getattr(pipe, name).named_parameters())
        changed = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
        assert changed == set(model.balance_report.parameters) != set()
        setattr(pipe, name, model)
    found = clip(pipe, seed=1)
    assert not torch.equal(found, expected)
    assert (found - expected).norm() / expected.norm() < 1e-4


@pytest.mark.slow
def test_a_model_under_two_names_is_balanced_once() -> None:
    pipe = pipeline()
    pipe.transformer_2 = pipe.transformer
    made = fxquant.balance_pipeline(pipe, calibrate=lambda: clip(pipe))
    assert made["transformer"] is made["transformer_2"]


def test_one_may_be_missing_and_options_reach_it() -> None:
    pipe = pipeline(second=False, boundary=None)
    seen = []

    def options(name: str) -> dict[str, Any]:
        seen.append(name)
        return {"measure": 1}

    made: Any = fxquant.balance_pipeline(pipe, calibrate=lambda: clip(pipe), for_component=options)
    assert list(made) == seen == ["transformer"] and made["transformer"].balance_report.calls == 1


def test_refusals_name_the_model() -> None:
    pipe = pipeline()
    with pytest.raises(ConfigurationError, match=r"two transformers; .* fxquant\.balance_pipeline"):
        fxquant.balance(pipe, calibrate=lambda: clip(pipe))
    with pytest.raises(ConfigurationError, match="no unet or prior; name its models"):
        fxquant.balance_pipeline(pipe, calibrate=lambda: clip(pipe), components=("unet", "prior"))
    with pytest.raises(ConfigurationError, match="statistics belong to one model"):
        fxquant.balance_pipeline(pipe, calibrate=lambda: clip(pipe), statistics=fxquant.Statistics())
    with pytest.raises(CalibrationError, match=r"^transformer_2: .*without calling the model") as caught:
        fxquant.balance_pipeline(pipe, calibrate=lambda: None)
    assert caught.value.component == "transformer_2"
