"""Precisions with branches of low rank as candidates."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import fxquant
from fxquant.allocation.candidates import Candidate
from fxquant.allocation.prepared import begun_from
from fxquant.errors import ConfigurationError
from fxquant.pipeline.recipes import Recipe, make_recipe
from fxquant.planning.branches import Branch, branch_bytes, branch_rank
from fxquant.planning.precision import Precision
from fxquant.planning.sensitivities import Sensitivities
from fxquant.runtime.float_model import dtype_of
from fxquant.statistics.collection import Statistics
from tests.tiny import calibrate

RECIPE = fxquant.make_recipe("svdquant-w4a8").with_options("split-low-rank", rank=4)
OPTIONS: dict[str, Any] = {"timesteps": 1, "measure": 0, "probes": 4}
CANDIDATES = ("w4a8", "w4a8-r0", "w4a8-g8-r2")
ADALN = "transformer_blocks.0.norm1.linear"


@pytest.fixture(scope="module")
def collected() -> Statistics:
    return Statistics(keep_calls=3)


@pytest.fixture(scope="module")
def known(model: nn.Module, collected: Statistics) -> Sensitivities:
    options = {"recipe": RECIPE, "candidates": CANDIDATES, **OPTIONS}
    return fxquant.sensitivity(model, calibrate=calibrate(model), statistics=collected, **options)


@pytest.mark.parametrize("text", ["w4a8", "w4a8-r0", "w4a4-g64-r16", "wfp8afp8-b128-r8", "w4a16-r4", "float"])
def test_a_candidate_is_its_text(text: str) -> None:
    assert str(Candidate.parse(text)) == text
    precision, _, rank = text.partition("-r")
    assert Candidate.parse(text) == Candidate(Precision.parse(precision), int(rank) if rank else None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("w4a8-r016", "write w4a8-r16"),
        ("w8a16-r4", "leave out the rank"),
        ("float-r0", "leave out the rank"),
        ("w4a8-r", "not a precision"),
        ("w4a8-r2-g64", "not a precision"),
    ],
)
def test_texts_that_are_not_candidates(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Candidate.parse(text)


def test_each_layer_has_the_branches_that_fit_it(known: Sensitivities, model: nn.Module) -> None:
    for name, layer in known.layers.items():
        assert layer.precisions == (CANDIDATES[:2] if name == ADALN else CANDIDATES)
        rows, columns = model.get_submodule(name).weight.shape  # type: ignore[union-attr, misc]
        beside = 0 if name == ADALN else 4 * (rows + columns) * 2  # Branches have 16 bits.
        assert layer.size("w4a8") - layer.size("w4a8-r0") == beside
    (what,) = known.left_out
    assert what == f"w4a8-g8-r2 in 1 layers, such as {ADALN}"


def test_a_layer_without_its_branch_is_that_of_a_recipe_without_branches(
    known: Sensitivities, model: nn.Module, collected: Statistics
) -> None:
    text = str(RECIPE)
    begin = text.index("split-low-rank")
    plain = Recipe.parse(text[:begin] + text[text.index("}", begin) + 2 :])
    found = fxquant.sensitivity(model, statistics=collected, recipe=plain, candidates=("w4a8",), **OPTIONS)
    for name, layer in found.layers.items():
        (own,), (other,) = layer.alone("w4a8"), known.of(name).alone("w4a8-r0")
        assert own and other and other == pytest.approx(own, rel=1e-3), name
        if name != ADALN:
            assert known.of(name).alone("w4a8")[0] != pytest.approx(own, rel=0.01)


def test_a_search_chooses_branches_layer_by_layer(
    known: Sensitivities, model: nn.Module, collected: Statistics
) -> None:
    small, large = (known.uniform_bytes(text) for text in ("w4a8-r0", "w4a8"))
    result = fxquant.search(model, size=(small + large) // 2, sensitivities=known, statistics=collected)
    assert result.point.size == result.plan.bytes_after <= (small + large) // 2
    assert len(set(result.chosen.values())) > 1
    ranks = {"w4a8": 4, "w4a8-r0": 0, "w4a8-g8-r2": 2}
    decided = result.plan.decisions_of(Branch)
    for name, text in result.chosen.items():
        layer = result.plan.layers[name]
        assert branch_rank(result.plan, name) == (0 if name == ADALN else ranks[text])
        assert layer.group_size == (8 if "-g8" in text else 0)
        stored = sum(
            tensor.nbytes for key, tensor in result.model.state_dict().items() if key.startswith(f"{name}.low_rank_")
        )
        assert stored == branch_bytes(result.plan, name, dtype_of(model))
    assert {decided[name].reason for name, text in result.chosen.items() if text == "w4a8-r0" and name in decided} <= {
        "the search chose no branch"
    }
    again = fxquant.compile(model, plan=result.plan, statistics=collected, measure=0)
    assert again.plan is not None and again.plan.bytes_after == result.plan.bytes_after


def test_ranks_without_branches_are_refused(model: nn.Module, collected: Statistics) -> None:
    with pytest.raises(ConfigurationError, match=r"candidate w4a8-r2 names the rank .* such as svdquant"):
        fxquant.sensitivity(model, recipe="rtn", candidates=("w4a8-r2",), statistics=collected, **OPTIONS)


@pytest.mark.parametrize("recipe", ["rtn-wfp8e5m2afp8", "rtn-wmxfp6e3m2amxfp6", "rtn-w4afp8e5m2-g16", "rtn-w4a8-b8x16"])
def test_a_recipe_may_begin_from_formats(recipe: str) -> None:
    assert begun_from(recipe, [Precision.parse("w8a8")], "default") == make_recipe(recipe)
    assert begun_from("rtn", [Precision.parse("w8a8")], "default") == make_recipe("rtn-w8a8")
