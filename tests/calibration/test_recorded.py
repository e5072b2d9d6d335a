"""A second conversion from the statistics of an earlier calibration."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fxquant
from fxquant.errors import CalibrationError
from fxquant.statistics.collection import Statistics
from tests.tiny import STEPS, calibrate, inputs, make_dit, run

LEARN = "reconstruct-blocks{iterations=20 samples=12 batch=4}"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, statistics = make_dit(), Statistics(keep_calls=8)
    fxquant.compile(model, recipe="rtn-w4a8", calibrate=calibrate(model), statistics=statistics, measure=0)
    path = tmp_path_factory.mktemp("statistics") / "file"
    statistics.save(path)
    return path


@pytest.mark.parametrize("recipe", ["ptq4dit-w8a8", "rtn-w8a8-g4", "htg-w4a8"])
def test_another_recipe_without_calibration(file: Path, recipe: str) -> None:
    """The result is that of a calibration, including bit widths that the first recipe did not have."""
    model = make_dit()
    again = fxquant.compile(model, recipe=recipe, statistics=Statistics.load(file))
    direct = fxquant.compile(model, recipe=recipe, calibrate=calibrate(model))
    assert torch.equal(run(again, seed=4), run(direct, seed=4))
    assert again.plan.layers == direct.plan.layers
    assert again.plan.output_sqnr_db.keys() == direct.plan.output_sqnr_db.keys() == set(STEPS)
    for step, db in direct.plan.output_sqnr_db.items():  # Measured on the same samples, by graphs.
        assert again.plan.output_sqnr_db[step] == pytest.approx(db, abs=0.1)


def test_passes_that_learn_from_calls(file: Path) -> None:
    """With a recipe, and with a plan, which had no calls before."""
    recipe = str(fxquant.make_recipe("rtn-w4a8")).replace("quantize-linears", f"{LEARN},quantize-linears")
    model, statistics = make_dit(), Statistics.load(file)
    direct = fxquant.compile(model, recipe=fxquant.Recipe.parse(recipe), calibrate=calibrate(model))
    again = fxquant.compile(model, recipe=fxquant.Recipe.parse(recipe), statistics=statistics)
    assert again.plan.reconstruction == direct.plan.reconstruction
    by_plan = fxquant.compile(model, plan=direct.plan.undecided(recipe), statistics=statistics)
    assert by_plan.plan.reconstruction == direct.plan.reconstruction
    with pytest.raises(CalibrationError, match="learns from calibration calls"):
        fxquant.compile(model, plan=direct.plan.undecided(recipe))


def test_calls_that_were_not_kept(file: Path) -> None:
    statistics = Statistics.load(file)
    statistics.calls.restore([])
    recipe = str(fxquant.make_recipe("rtn-w4a8")).replace("quantize-linears", f"{LEARN},quantize-linears")
    with pytest.raises(CalibrationError, match="keep none"):
        fxquant.compile(make_dit(), recipe=fxquant.Recipe.parse(recipe), statistics=statistics)


@pytest.mark.parametrize(
    ("recipe", "layers", "message"),
    [
        ("ptq4dit-gptq-w4a8", "default", "second moments"),
        ("single-step-w8a8", "default", "hold all steps of the sampler, and the recipe observes step 0"),
        ("rtn-w4a8", "all", "do not hold the inputs of"),
    ],
)
def test_what_was_not_observed_is_refused(file: Path, recipe: str, layers: str, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        fxquant.compile(make_dit(), recipe=recipe, layers=layers, statistics=Statistics.load(file))


def test_another_model_is_refused(file: Path) -> None:
    trained, wider = make_dit(), make_dit(attention_head_dim=12)
    trained.proj_out_2.weight.data += 0.01
    for model in (trained, wider, make_dit().double()):
        with pytest.raises(CalibrationError, match="other weights or another dtype"):
            fxquant.compile(model, recipe="rtn-w8a8", statistics=Statistics.load(file))


def test_statistics_made_by_hand_are_refused() -> None:
    statistics = Statistics()
    statistics.record("proj", torch.ones(1, 2, 3), torch.tensor(5.0))
    with pytest.raises(CalibrationError, match="do not say how the model was called"):
        fxquant.compile(make_dit(), recipe="rtn-w8a8", statistics=statistics)
    with pytest.raises(CalibrationError, match="pass calibrate="):
        fxquant.compile(make_dit(), recipe="rtn-w8a8", statistics=Statistics())


def test_two_kinds_of_call() -> None:
    """Each graph gets its own calls, and ranges cover both."""
    model, statistics = make_dit(), Statistics(keep_calls=8)

    def both() -> None:
        with torch.no_grad():
            for step in STEPS:
                model(**inputs(timestep=step))
                model(**inputs(timestep=step, size=4))

    direct = fxquant.compile(model, recipe="ptq4dit-w8a8", calibrate=both, statistics=statistics)
    assert [len(statistics.calls.of_kind(kind)) for kind in (0, 1)] == [3, 3]
    again = fxquant.compile(model, recipe="ptq4dit-w8a8", statistics=statistics)
    assert again.plan.layers == direct.plan.layers
    assert len(again.graphs) == 2
    for size in (8, 4):
        assert torch.equal(run(again, size=size), run(direct, size=size))
