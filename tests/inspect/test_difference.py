"""Differences of plans, recipes and graphs, aligned by layer and origin."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

import fxquant
from fxquant.errors import ConfigurationError, UnknownNameError
from fxquant.inspect.difference import diff
from fxquant.runtime.model import GraphModel
from tests.inspect.test_report import hand_made
from tests.tiny import calibrate, make_dit

QUERY = "transformer_blocks.0.attn1.to_q"
VALUE = "transformer_blocks.0.attn1.to_v"


def compiled(recipe: str) -> GraphModel:
    model = make_dit(layers=2)
    return fxquant.compile(model, recipe=recipe, calibrate=calibrate(model), measure=0)


@pytest.fixture(scope="module")
def four() -> GraphModel:
    return compiled("ptq4dit-w4a8")


@pytest.fixture(scope="module")
def eight() -> GraphModel:
    return compiled("rtn-w8a8")


def test_a_model_does_not_differ_from_its_checkpoint(four: GraphModel, tmp_path: Path) -> None:
    fxquant.save(four, tmp_path / "model")
    found = diff(four, tmp_path / "model")
    assert not found and str(found).endswith("no difference")


def test_plans(four: GraphModel, eight: GraphModel) -> None:
    found = diff(four, eight)
    assert ("balance-channels", None) in found.passes
    assert ("assign-precision{precision=w4a8}", "assign-precision") in found.passes
    change = next(one for one in found.layers if one.name == QUERY)
    assert change.what["precision"] == ("w4a8", "w8a8")
    assert change.what["balance"] == ("free, 16 channels", "-")
    assert "transformer_blocks.0-1.attn1.to_q" in str(found)


def test_graphs_are_aligned_by_layer(four: GraphModel, eight: GraphModel) -> None:
    found = diff(four, eight, layer=QUERY)
    assert (found.nodes.added, found.nodes.removed) == ((), ())
    (rewired,) = found.nodes.rewired
    assert (rewired.before, rewired.after) == ({"w_format": "int4"}, {"w_format": "int8"})
    assert found.ops[rewired.node] == f"fxquant::linear (product of {QUERY})"


def test_tensors_name_the_pass_and_the_factor(four: GraphModel, eight: GraphModel) -> None:
    (weight,) = [one for one in diff(four, eight, layer=VALUE).tensors if one.tensor == f"{VALUE}.weight"]
    assert [text.partition(": ")[0] for text in weight.left] == ["balance-channels", "absorb-affines"]
    assert weight.left[1].startswith("absorb-affines: folded times 0.") and weight.left[1].endswith("along its rows")
    assert weight.right == ()


def test_before_and_after_a_pass(four: GraphModel) -> None:
    found = diff(four, step="absorb-affines", block=1)
    assert found.nodes.added == () and len(found.nodes.removed) == 6
    names = [f"{layer}.{part}" for layer in ("attn1.to_v", "norm1.linear") for part in ("weight", "bias")]
    assert {one.tensor for one in found.tensors} == {f"transformer_blocks.1.{name}" for name in names}
    assert "transformer_blocks.1.norm1.linear.weight: absorb-affines: folded times" in str(found)
    assert diff(four, step="absorb-affines", block="transformer_blocks.1") == found


def test_after_a_pass_of_two_plans(four: GraphModel, eight: GraphModel) -> None:
    assert not diff(four, eight, step="remove-no-ops").nodes.rewired
    assert "balance-channels" not in str(diff(four, eight, step="remove-no-ops").tensors)


def test_plans_without_models() -> None:
    left = hand_made()
    right = copy.deepcopy(left)
    right.layers["blocks.3.ff"].group_size = 32
    del right.layers["proj_out"]
    right.backend = "native"
    found = diff(left, right)
    assert found.nodes is None
    assert [(one.name, dict(one.what)) for one in found.layers] == [
        ("blocks.3.ff", {"precision": ("w4a16-g64", "w4a16-g32")})
    ]
    assert found.only_left == ("proj_out",) and found.facts == {"backend": ("fake-quant", "native")}
    assert not diff(left, copy.deepcopy(left))


def test_a_folder_with_a_plan_alone(tmp_path: Path) -> None:
    plan = hand_made()
    plan.save(tmp_path / "plan")
    assert not diff(tmp_path / "plan", plan)


def test_factors_with_equal_ranges_differ(four: GraphModel) -> None:
    other = copy.deepcopy(four.plan)
    other.vectors[QUERY] = other.vectors[QUERY].flip(0)
    (change,) = diff(four.plan, other).layers
    assert change.name == QUERY and change.what["factors"][1].endswith("other values")


def test_recipes() -> None:
    found = diff("ptq4dit-w4a8", "ptq4dit-w8a8")
    assert found.passes == (("assign-precision{precision=w4a8}", "assign-precision"),)
    assert not diff(fxquant.make_recipe("rtn-w8a8"), "rtn-w8a8")


def test_it_is_json(four: GraphModel, eight: GraphModel) -> None:
    data = json.loads(json.dumps(diff(four, eight).to_json(), allow_nan=False))
    assert data["layers"][0]["name"] and data["nodes"]["rewired"]


class TestRefusals:
    def test_nothing_to_compare_with(self, four: GraphModel) -> None:
        with pytest.raises(ConfigurationError, match="name a second plan, model or recipe"):
            diff(four)

    def test_a_recipe_and_a_model(self, four: GraphModel) -> None:
        with pytest.raises(ConfigurationError, match="a recipe can be compared with another recipe only"):
            diff("rtn-w8a8", four)

    def test_unknown_names(self, four: GraphModel) -> None:
        with pytest.raises(UnknownNameError, match=r"unknown block '7'\. Known: .*transformer_blocks\.0"):
            diff(four, step="absorb-affines", block=7)
        with pytest.raises(UnknownNameError, match=r"unknown layer 'to_q'\. Known: "):
            diff(four, step="absorb-affines", layer="to_q")
        with pytest.raises(UnknownNameError, match=r"unknown step 'absorb'\. Known: .*absorb-affines"):
            diff(four, step="absorb")


def test_a_part_that_neither_plan_has_is_refused_without_graphs_too(four: GraphModel, eight: GraphModel) -> None:
    plans = four.plan, eight.plan
    with pytest.raises(UnknownNameError, match=r"unknown block '9'.*transformer_blocks\.1"):
        diff(*plans, block=9)
    with pytest.raises(UnknownNameError, match=f"unknown layer.*{QUERY}"):
        diff(*plans, layer=QUERY[:-1])
    with pytest.raises(UnknownNameError, match="unknown layer"):
        diff(*plans, block=1, layer=QUERY)
    assert diff(*plans, block=1, layer="transformer_blocks.1.attn1").layers


def test_what_cannot_be_compared_is_refused_and_not_left_out(four: GraphModel, eight: GraphModel) -> None:
    with pytest.raises(ConfigurationError, match="a plan alone has no graph to compare after absorb-affines"):
        diff(four.plan, eight, step="absorb-affines")
    for part in ({"step": "absorb-affines"}, {"block": 3}, {"layer": QUERY}):
        with pytest.raises(ConfigurationError, match="recipes have no blocks"):
            diff("ptq4dit-w4a8", "htg-w4a8", **part)
