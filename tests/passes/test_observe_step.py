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


@pytest.mark.parametrize(("later", "seen"), [(0, [0]), (1, [0, 4]), (2, [0, 2, 4]), (9, [0, 1, 2, 3, 4])])
def test_later_steps_are_observed_evenly_spread_on_what_the_sampler_made(later: int, seen: list[int]) -> None:
    """The calls of later steps get the output of step 0; what is observed is what these calls were given."""
    model, statistics = make_dit(), Statistics()
    steps = [900.0, 700.0, 500.0, 300.0, 100.0]
    outputs = []

    def sampled() -> None:
        for _ in range(2):  # Two runs of the sampler; each begins again at step 0.
            latents = inputs(2, 900.0)["hidden_states"]
            for step in steps:
                output = run_once(model, latents, step)
                outputs.append(output)
                latents.sub_(output[:, :4] / 5)  # In place, as some samplers do.

    recipe = fxquant.Recipe.parse(RECIPE.format(f"0 later={later}"))
    quantized = fxquant.compile(model, recipe=recipe, calibrate=sampled, statistics=statistics, measure=0)
    assert statistics.timesteps.tolist() == quantized.plan.timesteps == [steps[number] for number in reversed(seen)]
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert (quantized.plan.observed_step, quantized.plan.later_steps) == (0, later)
    first = statistics["proj_out_2"] if "proj_out_2" in statistics else next(iter(statistics.values()))
    assert len(set(first.count.tolist())) == 1  # Each observed step saw the tokens of both runs.
    again = Plan.from_json(quantized.plan.to_json(), quantized.plan.vectors)
    assert again.later_steps == later


def run_once(model: torch.nn.Module, latents: torch.Tensor, step: float) -> torch.Tensor:
    call = {**inputs(2, step), "hidden_states": latents}
    with torch.no_grad():
        found: torch.Tensor = model(**call).sample
    return found


def test_the_inputs_of_later_steps_are_those_of_a_large_step() -> None:
    """The ranges of the last step are those of the observed graph on the latents that the sampler ended with."""
    model, statistics, direct = make_dit(), Statistics(), Statistics()
    start = inputs(2, 900.0)["hidden_states"]
    ends = []

    def sampled() -> None:
        latents = start.clone()
        for step in (900.0, 500.0, 100.0):
            ends.append(latents.clone())
            latents -= run_once(model, latents, step)[:, :4] / 3

    parse = fxquant.Recipe.parse
    fxquant.compile(model, recipe=parse(RECIPE.format("0 later=1")), calibrate=sampled, statistics=statistics)
    every = parse("assign-precision ; quantize-linears,quantize-embeddings")
    fxquant.compile(
        model, recipe=every, calibrate=lambda: run_once(model, ends[-1], 100.0), statistics=direct, measure=0
    )
    for key in direct:
        at = statistics[key].timesteps.tolist().index(100.0)
        assert torch.equal(statistics[key].minimum[at], direct[key].minimum[0])
        assert torch.equal(statistics[key].maximum[at], direct[key].maximum[0])


def test_statistics_of_other_later_steps_are_refused() -> None:
    model, statistics = make_dit(), Statistics(keep_calls=4)
    one, two = (fxquant.Recipe.parse(RECIPE.format(f"0 later={later}")) for later in (1, 2))
    fxquant.compile(model, recipe=one, calibrate=calibrate(model), statistics=statistics, measure=0)
    fxquant.compile(model, recipe=one, statistics=statistics, measure=0)
    with pytest.raises(CalibrationError, match=r"hold step 0 and 1 later of the sampler.*observes step 0 and 2 later"):
        fxquant.compile(model, recipe=two, statistics=statistics, measure=0)


def test_later_steps_of_a_sampler_that_makes_one() -> None:
    model, statistics = make_dit(), Statistics()
    recipe = fxquant.Recipe.parse(RECIPE.format("0 later=2"))
    fxquant.compile(model, recipe=recipe, calibrate=calibrate(model, [900.0]), statistics=statistics, measure=0)
    assert statistics.timesteps.tolist() == [900.0]


def test_a_negative_number_of_later_steps() -> None:
    with pytest.raises(ConfigurationError, match="-1 later steps are not possible"):
        parse_pass("observe-step{later=-1}")
    assert str(parse_pass("observe-step{step=2 later=1}")) == "observe-step{step=2 later=1}"
