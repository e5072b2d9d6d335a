"""Ranges chosen layer by layer, by the error of the model's output."""

from __future__ import annotations

import numpy as np
import pytest

import fxquant
from fxquant.backends.native import machine
from fxquant.errors import CalibrationError, ConfigurationError
from fxquant.passes.choose_variants import BINS, CLIPPED, STATIC, TOKEN, ChooseVariants, Variant, choose
from fxquant.pipeline.pipeline import parse_pass
from fxquant.statistics.collection import Statistics
from tests.tiny import calibrate, make_dit

RECIPE = (
    "remove-no-ops,assign-precision{precision=w8a8} ; "
    "choose-variants{%s},quantize-linears{%s},quantize-convolutions,quantize-embeddings"
)


def row(*values: float) -> np.ndarray:
    return np.array(values)


def test_bins_are_free_and_a_range_per_token_has_to_gain() -> None:
    small = {STATIC: row(1.0, 1.0), BINS: row(0.9, 0.9), TOKEN: row(0.895, 0.895)}
    large = {STATIC: row(9.0, 9.0), BINS: row(9.1, 9.1), TOKEN: row(1.0, 1.0)}
    assert choose([small, large], gain=0.05) == [BINS, TOKEN]
    assert choose([small, large], gain=0.0) == [TOKEN, TOKEN]
    assert choose([small, large], gain=100.0) == [BINS, STATIC]


def test_every_timestep_counts_alike() -> None:
    """The first layer's gain is large where the error is large anyway, the second one's where it is small."""
    first = {STATIC: row(100.0, 0.01), TOKEN: row(90.0, 0.01)}
    second = {STATIC: row(1.0, 0.09), TOKEN: row(1.0, 0.01)}
    assert choose([first, second], gain=1.0) == [STATIC, TOKEN]


@pytest.mark.slow
def test_a_model_is_better_than_with_either_kind_alone() -> None:
    model, statistics = make_dit(), Statistics(keep_calls=6)
    plain = fxquant.compile(model, recipe="rtn-w8a8", calibrate=calibrate(model), statistics=statistics)
    recipe = fxquant.Recipe.parse(RECIPE % ("gain=0.1 calls=3 probes=16", ""))
    made = fxquant.compile(model, recipe=recipe, statistics=statistics)
    assert plain.plan is not None and made.plan is not None
    choices = made.plan.decisions_of(Variant)
    assert {choice.chosen for choice in choices.values()} <= {STATIC, BINS, CLIPPED, TOKEN}
    assert any(choice.chosen != STATIC for choice in choices.values())
    for name, choice in choices.items():
        layer = made.plan.layers[name]
        assert layer.activation is not None
        assert (layer.activation.method == "dynamic") == (choice.chosen == TOKEN)
        assert (layer.activation.method == "mse") == (choice.chosen == CLIPPED)
        assert bool(layer.boundaries) == (choice.chosen in (BINS, CLIPPED))
    before, after = (np.mean(list(each.plan.output_sqnr_db.values())) for each in (plain, made))
    assert after > before
    assert "decisions of choose-variants" in str(fxquant.report(made))
    again = fxquant.compile(model, plan=made.plan)  # Needs neither statistics nor calls.
    assert again.plan is not None and again.plan.layers == made.plan.layers


def test_without_clipping_no_end_is_clipped() -> None:
    model, statistics = make_dit(), Statistics(keep_calls=3)
    recipe = fxquant.Recipe.parse(RECIPE % ("clip=False gain=100 calls=1 probes=1", ""))
    made = fxquant.compile(model, recipe=recipe, calibrate=calibrate(model), statistics=statistics, measure=0)
    assert made.plan is not None
    for choice in made.plan.decisions_of(Variant).values():
        assert CLIPPED not in {choice.chosen, *choice.others_db} and choice.chosen != TOKEN


def test_groups_where_they_fit_and_where_weights_have_few_bits() -> None:
    model, statistics = make_dit(), Statistics(keep_calls=3)
    text = (RECIPE % ("groups=32 calls=1 probes=1", "")).replace("w8a8", "w4a8")
    made = fxquant.compile(
        model, recipe=fxquant.Recipe.parse(text), calibrate=calibrate(model), statistics=statistics, measure=0
    )
    assert made.plan is not None
    groups = {layer.shape[1]: layer.group_size for layer in made.plan.layers.values() if layer.weight_bits == 4}
    assert groups and all(size == (32 if width % 32 == 0 and width > 32 else 0) for width, size in groups.items())
    assert 32 in groups.values()


@pytest.mark.parametrize(
    ("backend", "missing"),
    [("native", "they are left out here"), ("native{kernels=onednn}", None)],  # In both, oneDNN multiplies.
)
def test_no_groups_on_a_backend_that_does_not_run_them(
    backend: str, missing: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "missing_kernels", lambda: missing)
    monkeypatch.setattr(machine, "has_tiles", lambda: False)
    model = make_dit()
    text = (RECIPE % ("groups=32 calls=1 probes=1", "")).replace("w8a8", "w4a8")
    statistics = Statistics(keep_calls=3)
    made = fxquant.compile(
        model,
        recipe=fxquant.Recipe.parse(text),
        backend=backend,
        calibrate=calibrate(model),
        statistics=statistics,
        measure=0,
    )
    assert made.plan is not None
    assert {layer.group_size for layer in made.plan.layers.values()} == {0}


def test_without_calls_it_says_what_to_give() -> None:
    model, statistics = make_dit(), Statistics()
    fxquant.compile(model, recipe="rtn-w8a8", calibrate=calibrate(model), statistics=statistics, measure=0)
    with pytest.raises(CalibrationError, match="keep_calls"):
        fxquant.compile(model, recipe=fxquant.Recipe.parse(RECIPE % ("", "")), statistics=statistics)


@pytest.mark.parametrize("option", ["bins=0", "calls=0", "probes=0", "gain=-1", "groups=-2"])
def test_options_that_are_not_possible(option: str) -> None:
    with pytest.raises(ConfigurationError, match=option.partition("=")[0]):
        parse_pass(f"choose-variants{{{option}}}")
    assert str(ChooseVariants(gain=0.5)) == "choose-variants{gain=0.5}"
