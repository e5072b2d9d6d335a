"""Precisions for a size, a quality or a speed."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import fxquant
from fxquant.allocation.candidates import with_precisions
from fxquant.allocation.picture import pareto_figure
from fxquant.allocation.result import Choice, SearchResult
from fxquant.allocation.search import mean_sqnr
from fxquant.errors import CalibrationError, ConfigurationError, UnreachableTargetError
from fxquant.inspect.plots import save_figure
from fxquant.planning.plan import Plan
from fxquant.planning.precision import Precision
from fxquant.planning.sensitivities import Sensitivities
from fxquant.statistics.collection import Statistics
from tests.tiny import calibrate, make_dit

OPTIONS: dict[str, Any] = {
    "candidates": ("w3a8", "w5a8", "w8a8"),
    "recipe": "smoothquant",
    "timesteps": 2,
    "measure": 0,
}


@pytest.fixture(scope="module")
def known(model: nn.Module, statistics: Statistics) -> Sensitivities:
    return fxquant.sensitivity(model, statistics=statistics, probes=8, samples=4, **OPTIONS)


@pytest.fixture(scope="module")
def found(model: nn.Module, statistics: Statistics, known: Sensitivities) -> SearchResult:
    return fxquant.search(model, size=known.uniform_bytes("w5a8"), sensitivities=known, statistics=statistics)


@pytest.mark.slow
def test_the_size_is_kept_and_the_quality_better_than_uniform(found: SearchResult, known: Sensitivities) -> None:
    assert found.point.size <= known.uniform_bytes("w5a8")
    assert found.point.size == found.plan.bytes_after  # What the choice predicts is what the model has.
    assert len(set(found.chosen.values())) > 1
    uniform, measured = known.uniform_db("w5a8"), found.point.measured_db
    assert uniform is not None and measured is not None and measured > uniform
    assert found.average_bits <= 8 * (known.uniform_bytes("w5a8") - known.bytes_fixed) / sum(
        layer.weights for layer in known.layers.values()
    )


def test_one_precision_for_all_layers_wins_if_it_fits_and_measures_better(
    model: nn.Module, statistics: Statistics, known: Sensitivities
) -> None:
    """Estimates that are upside down choose the worst precisions, which the measurement shows."""
    layers = {
        name: replace(one, estimated=one.estimated[::-1], measured=tuple((None,) * len(row) for row in one.measured))
        for name, one in known.layers.items()
    }
    wrong = replace(known, layers=layers)
    result = fxquant.search(model, size=known.uniform_bytes("w8a8"), sensitivities=wrong, statistics=statistics)
    assert set(result.chosen.values()) == {"w8a8"}
    first, second = (point.measured_db for point in result.checks)
    assert first is not None and second == result.point.measured_db and second > first + 10


def test_the_plan_holds_the_choices_and_why(found: SearchResult, tmp_path: Path) -> None:
    for name, text in found.chosen.items():
        assert str(found.plan.layers[name].precision) == text
    choices = found.plan.decisions_of(Choice)
    assert choices.keys() == found.chosen.keys()
    assert sum(choice.share for choice in choices.values()) == pytest.approx(1, abs=1e-6)
    found.plan.save(tmp_path)
    assert Plan.load(tmp_path) == found.plan
    text = str(fxquant.report(found.model))
    assert "decisions of search" in text and "would save" in text
    assert "bits per weight" in str(found) and max(map(len, str(found).splitlines())) <= 140
    assert found.to_json()["choices"].keys() == found.chosen.keys()


def test_the_same_call_makes_the_same_plan(
    found: SearchResult, model: nn.Module, statistics: Statistics, known: Sensitivities
) -> None:
    again = fxquant.search(model, size=known.uniform_bytes("w5a8"), sensitivities=known, statistics=statistics)
    assert again.plan == found.plan


@pytest.mark.slow
def test_layers_that_read_the_same_value_share_their_codes(model: nn.Module, statistics: Statistics) -> None:
    options = {**OPTIONS, "candidates": ("w3a4", "w3a8", "w8a4", "w8a8"), "timesteps": 1, "probes": 1}
    result = fxquant.search(model, size=0.4, statistics=statistics, **options)
    bits = {name: layer.activation_bits for name, layer in result.plan.layers.items()}
    for number in ("q", "k", "v"):
        assert bits[f"transformer_blocks.0.attn1.to_{number}"] == bits["transformer_blocks.0.attn1.to_q"]


@pytest.mark.slow
def test_an_sqnr_is_reached_by_the_smallest_model_that_measures_it(
    model: nn.Module, statistics: Statistics, known: Sensitivities
) -> None:
    low, high = known.uniform_db("w3a8"), known.uniform_db("w8a8")
    assert low is not None and high is not None
    target = (low + high) / 2
    result = fxquant.search(model, sqnr=target, sensitivities=known, statistics=statistics)
    assert result.point.measured_db is not None and result.point.measured_db >= target
    assert result.point.size < known.uniform_bytes("w8a8")
    assert all(one.size >= result.point.size or (one.measured_db or 0) < target for one in result.checks)


@pytest.mark.slow
def test_targets_that_cannot_be_reached(model: nn.Module, statistics: Statistics, known: Sensitivities) -> None:
    with pytest.raises(UnreachableTargetError, match="the smallest has") as said:
        fxquant.search(model, size=0.01, sensitivities=known, statistics=statistics)
    assert said.value.best == pytest.approx(known.uniform_bytes("w3a8") / known.bytes_before)
    with pytest.raises(
        UnreachableTargetError, match=r"a model of 1\.5 bytes \(a size above 1 counts bytes, not shares"
    ):
        fxquant.search(model, size=1.5, sensitivities=known, statistics=statistics)
    with pytest.raises(UnreachableTargetError, match="the best has") as said:
        fxquant.search(model, sqnr=200, sensitivities=known, statistics=statistics)
    assert said.value.best < 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of size, sqnr and speed, not none"),
        ({"size": 0.2, "speed": 2}, "not size and speed"),
        ({"size": -1}, "size=-1"),
        ({"speed": float("nan")}, "speed=nan"),
        ({"size": "small"}, "a number"),
        ({"size": 0.2, "checks": 0}, "checks=0"),
        ({"size": 0.2, "resume": 3}, "the path of a folder"),
        ({"size": 0.2, "sensitivities": "file"}, "what fxquant.sensitivity returned"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str, model: nn.Module, statistics: Statistics) -> None:
    with pytest.raises(ConfigurationError, match=message):
        fxquant.search(model, statistics=statistics, **options)


def test_sensitivities_of_other_candidates_are_refused(
    model: nn.Module, known: Sensitivities, statistics: Statistics
) -> None:
    given: dict[str, Any] = {"size": 1e-9, "sensitivities": known, "statistics": statistics}
    with pytest.raises(ConfigurationError, match=r"candidates are w3a3, .* those of w3a8, w5a8, w8a8; leave"):
        fxquant.search(model, candidates=("w3a3",), **given)
    with pytest.raises(ConfigurationError, match=r"recipe is svdquant, .* of the recipe remove-no-ops,"):
        fxquant.search(model, recipe="svdquant", **given)
    with pytest.raises(UnreachableTargetError):  # Those that were measured may be named.
        fxquant.search(model, candidates=("w8a8", "w3a8", "w5a8"), recipe="smoothquant", **given)


def test_sensitivities_of_other_weights_are_refused(known: Sensitivities, statistics: Statistics) -> None:
    with pytest.raises(ConfigurationError, match="other weights"):
        fxquant.search(make_dit(layers=2), size=0.2, sensitivities=known, statistics=statistics)


def test_the_picture(found: SearchResult, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = pareto_figure(found)
    (axis,) = figure.axes
    labels = [text.get_text() for text in axis.texts]
    assert labels == list(found.sensitivities.output)
    save_figure(figure, tmp_path / "pareto.svg")
    assert "uniform, measured" in (tmp_path / "pareto.svg").read_text()


@pytest.mark.slow
def test_sizes_are_those_of_the_model_whatever_the_recipe_begins_from(model: nn.Module) -> None:
    recipe = fxquant.make_recipe("svdquant-w6a8").with_options("split-low-rank", rank=2)
    candidates = ("w4a8", "w8a16", "float")
    collected = Statistics(keep_calls=6)
    options: dict[str, Any] = {"recipe": recipe, "candidates": candidates, "timesteps": 1, "probes": 1, "measure": 0}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        known = fxquant.sensitivity(model, calibrate=calibrate(model), statistics=collected, **options)
    assert not [one for one in said if "changes no layer" in str(one.message)]  # Branches were decided before.
    for layer in known.layers.values():  # Without its branch, a layer has the whole weight to round.
        for precision in ("w4a8", "w8a16"):
            (alone,), (together,) = layer.alone(precision), known.output[precision]
            assert alone is not None and together is not None and alone < 4 * together
    for precision in ("w4a8", "w8a16"):  # Neither is the precision of the recipe; the second one has no branches.
        limit = known.uniform_bytes(precision)
        result = fxquant.search(model, size=limit, sensitivities=known, statistics=collected)
        assert result.point.size == result.plan.bytes_after <= limit
        forced = {name: precision for name in known.layers}
        uniform = with_precisions(result.plan, {name: Precision.parse(text) for name, text in forced.items()})
        made = fxquant.compile(model, plan=uniform, statistics=collected, measure=0)
        assert made.plan is not None
        # Scales of inputs, which layers with float inputs do not have, are not counted by layer.
        assert 0 <= limit - made.plan.bytes_after <= 8 * len(known.layers)
        layers = fxquant.report(made).layers
        own = [layer.bytes_after for layer in layers if "@" not in layer.name]  # Further uses share the weight.
        assert sum(own) <= made.plan.bytes_after


@pytest.mark.slow
def test_a_model_without_error_reaches_every_target(model: nn.Module, statistics: Statistics) -> None:
    options = {**OPTIONS, "candidates": ("w4a8", "float"), "layers": "blocks", "probes": 1}
    result = fxquant.search(model, sqnr=500, statistics=statistics, **options)
    assert set(result.chosen.values()) == {"float"} and result.point.measured_db == float("inf")
    assert "inf" in str(result) and result.to_json()["point"]["measured_db"] == "inf"
    pareto_figure(result)


def test_outputs_that_are_not_finite_count() -> None:
    assert mean_sqnr([20.0, float("nan")]) == mean_sqnr([20.0, -float("inf")]) == -float("inf")
    assert mean_sqnr([20.0, float("inf"), 30.0]) == 25 and mean_sqnr([float("inf")]) == float("inf")
    assert mean_sqnr([]) is None


@pytest.mark.slow
def test_rotated_layers_are_compared_with_rotated_ones(model: nn.Module) -> None:
    """Layers with float inputs read the same rotated values as the recipe's own precision."""
    options: dict[str, Any] = {"calibrate": calibrate(model), "timesteps": 1, "probes": 1, "measure": 0}
    known = fxquant.sensitivity(model, recipe="quarot-w8a8", candidates=("w4a16", "w8a16"), **options)
    for layer in known.layers.values():
        for precision in ("w4a16", "w8a16"):
            (alone,), (together,) = layer.alone(precision), known.output[precision]
            assert alone is not None and together is not None and alone < 4 * together
    with pytest.raises(ConfigurationError, match=r"is rotated as w4a8 and not as w4a16.*; begin from a recipe that"):
        fxquant.sensitivity(model, recipe="quarot-gptq-w4a16", candidates=("w4a8",), **options)


@pytest.mark.slow
def test_the_reason_why_a_candidate_is_left_out_is_whole(model: nn.Module, statistics: Statistics) -> None:
    options: dict[str, Any] = {"candidates": ("w4a8-g48", "w8a8"), "recipe": "smoothquant-w8a8", "timesteps": 1}
    known = fxquant.sensitivity(model, statistics=statistics, probes=1, measure=0, **options)
    assert {key.split()[0]: text.split(" of ")[0] for key, text in known.left_out.items()} == {"w4a8-g48": "groups"}
    assert not any(text.endswith(":") for text in known.left_out.values())


@pytest.mark.slow
def test_an_interrupted_search_continues(model: nn.Module, statistics: Statistics, tmp_path: Path) -> None:
    options: dict[str, Any] = {**OPTIONS, "size": 0.4, "probes": 1, "recipe": "rtn", "statistics": statistics}

    def kill(what: str, done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fxquant.search(model, **options, resume=tmp_path, progress=kill)
    seen: list[str] = []
    again = fxquant.search(model, **options, resume=tmp_path, progress=lambda what, done, total: seen.append(what))
    assert sum(what.startswith("timestep") for what in seen) == 1  # Of two.
    assert again.plan == fxquant.search(model, **options).plan
    known = again.sensitivities
    given = fxquant.search(model, size=0.4, statistics=statistics, sensitivities=known, resume=tmp_path)
    assert given.plan == again.plan


@pytest.mark.slow
def test_errors_that_are_not_finite_are_kept_and_avoided(
    model: nn.Module, statistics: Statistics, known: Sensitivities, tmp_path: Path
) -> None:
    """A layer whose output overflows in one precision does not get it; one that has no other is named."""
    name, layer = next(iter(known.layers.items()))
    row = (float("inf"), *layer.estimated[0][1:])
    given = replace(
        known,
        layers={**known.layers, name: replace(layer, estimated=(row, *layer.estimated[1:]))},
        output={**known.output, "w3a8": (float("inf"), *known.output["w3a8"][1:])},
    )
    given.save(tmp_path / "kept")
    assert Sensitivities.load(tmp_path / "kept") == given
    assert given.uniform_db("w3a8") == -float("inf") and "-inf" in str(given)
    least = given.uniform_bytes("w3a8") + layer.size("w5a8") - layer.size("w3a8")
    found = fxquant.search(model, size=least, sensitivities=given, statistics=statistics)
    assert found.chosen[name] == "w5a8" and {*found.chosen.values()} == {"w3a8", "w5a8"}
    pareto_figure(found)
    bad = replace(layer, estimated=(row,) * len(layer.precisions))
    given = replace(given, layers={**known.layers, name: bad})
    with pytest.raises(ConfigurationError, match=f"layer '{name}' makes the output infinite or NaN in each of w3a8"):
        fxquant.search(model, size=0.5, sensitivities=given, statistics=statistics)


@pytest.mark.slow
def test_a_model_whose_output_is_0_is_refused() -> None:
    """As that of a model whose last layer was initialized with zeros."""
    model = make_dit()
    for parameter in model.proj_out_2.parameters():
        nn.init.zeros_(parameter)
    with pytest.raises(CalibrationError, match=r"at timestep \d+ is 0 everywhere.*leave this timestep out"):
        fxquant.sensitivity(model, calibrate=calibrate(model), **{**OPTIONS, "probes": 1, "recipe": "rtn"})
