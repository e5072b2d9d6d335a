from __future__ import annotations

import pytest
import torch

import fxquant
from fxquant.errors import CalibrationError, ConfigurationError
from fxquant.passes.observe_step import ObserveStep
from fxquant.pipeline.pipeline import Pipeline, parse_pass
from fxquant.planning.plan import Plan
from fxquant.statistics.collection import Statistics
from tests.passes.models import Timed, timed
from tests.support import captured, text
from tests.tiny import STEPS, calibrate, inputs, make_dit


def test_the_plan_says_which_step_and_the_graph_stays() -> None:
    module, plan = captured(Timed(), **timed()).module, Plan("", "", "timestep")
    before = text(module)
    assert plan.observed_step is None
    for _ in range(2):
        (record,) = Pipeline.parse("observe-step{step=3}").run(module, plan)
        assert (record.edits, text(module), plan.observed_step) == (0, before, 3)


def test_options_round_trip_and_bad_ones_are_refused_at_once() -> None:
    assert str(ObserveStep()) == "observe-step" and parse_pass("observe-step") == ObserveStep(0)
    assert parse_pass(str(ObserveStep(7))) == ObserveStep(7)
    with pytest.raises(ConfigurationError, match="step -1 is negative; choose 0 or more"):
        ObserveStep(-1)
    with pytest.raises(ConfigurationError, match="cannot be read as int"):
        parse_pass("observe-step{step=first}")


RECIPE = "assign-precision,observe-step{{step={}}} ; quantize-linears,quantize-embeddings"


@pytest.mark.parametrize("step", [0, 1, 2])
def test_one_step_is_seen(step: int) -> None:
    model, statistics = make_dit(), Statistics()
    recipe = fxquant.Recipe.parse(RECIPE.format(step))
    quantized = fxquant.compile(model, recipe=recipe, calibrate=calibrate(model), statistics=statistics, measure=0)
    assert statistics.timesteps.tolist() == quantized.plan.timesteps == [STEPS[step]]
    assert quantized.plan.observed_step == step


def test_a_step_that_never_comes() -> None:
    model = make_dit()
    with pytest.raises(CalibrationError, match=r"step 7 is to be observed.*made 3; make more"):
        fxquant.compile(model, recipe=fxquant.Recipe.parse(RECIPE.format(7)), calibrate=calibrate(model), measure=0)


def test_samples_at_several_timesteps_are_no_step() -> None:
    model = make_dit()
    call = inputs(4, None)
    assert len(torch.unique(call["timestep"])) > 1
    with pytest.raises(CalibrationError, match="that have one timestep each"):
        fxquant.compile(
            model, recipe=fxquant.Recipe.parse(RECIPE.format(0)), calibrate=lambda: model(**call), measure=0
        )
