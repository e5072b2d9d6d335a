from __future__ import annotations

import pytest
import torch

import fxquant
from examples.digits.single_step import Comparison, main, plan_of_timestep
from fxquant.statistics.collection import Statistics
from tests.tiny import STEPS, calibrate, inputs, make_dit

PRECISION = "w8a8"


def test_the_table_of_a_tiny_model() -> None:
    model = make_dit()
    calls = [((), inputs(2, step, seed=9)) for step in STEPS]
    with torch.no_grad():
        noise = [model(**keywords).sample for _, keywords in calls]
    compared = Comparison(model, PRECISION, calibrate(model), calls, noise)
    rows = list(compared.rows(steps=[0, 2], later=[1]))
    expected = ["all steps", "step 0 and 1 later", f"step 0 (t = {STEPS[0]:g})", f"step 2 (t = {STEPS[2]:g})"]
    assert [row.observed for row in rows] == expected
    assert [row.forwards for row in rows] == [3, 2, 1, 3]
    assert all(row.sqnr_db >= row.worst_db > 10 for row in rows)


def test_a_plan_with_the_ranges_of_one_timestep_is_what_that_step_alone_gives() -> None:
    model, statistics = make_dit(), Statistics()
    whole = fxquant.compile(model, recipe=f"rtn-{PRECISION}", calibrate=calibrate(model), statistics=statistics)
    recipe = fxquant.make_recipe(f"single-step-{PRECISION}").with_options("observe-step", step=1, later=0)
    alone = fxquant.compile(model, recipe=recipe, calibrate=calibrate(model))
    made = plan_of_timestep(whole.plan, statistics, STEPS[1])
    ranges = {name: layer.activation and layer.activation.low for name, layer in made.layers.items()}
    assert ranges == {name: layer.activation and layer.activation.low for name, layer in alone.plan.layers.items()}
    assert whole.plan.layers != made.layers


def test_the_help_says_what_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0 and "every choice of the one step" in capsys.readouterr().out
