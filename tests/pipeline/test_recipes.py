"""Recipes: names with precisions and roundings, text that parses back, options."""

from __future__ import annotations

import pytest

from fxquant.errors import ConfigurationError, UnknownNameError
from fxquant.passes._inputs import InputRange
from fxquant.passes._rounders import RangeSearch, Rounding
from fxquant.passes.split_low_rank import BranchType, SplitLowRank
from fxquant.pipeline.recipes import DYNAMIC, ROUNDINGS, Recipe, make_recipe
from fxquant.testing import own_recipes


def step(recipe: Recipe, name: str) -> object:
    (found,) = (step for step in recipe.convert if step.name == name)
    return found


@pytest.mark.parametrize("rounding", ["", *(f"-{rounding}" for rounding in ROUNDINGS)])
@pytest.mark.parametrize("name", own_recipes())
def test_every_name_with_every_rounding_parses_back_from_its_text(name: str, rounding: str) -> None:
    made = make_recipe(f"{name}{rounding}-w4a8-g16")
    assert Recipe.parse(str(made)) == made


@pytest.mark.parametrize("rounding", ["", *(f"-{rounding}" for rounding in ROUNDINGS)])
@pytest.mark.parametrize("name", [name for name in own_recipes() if name != DYNAMIC])
def test_ranges_of_tokens_are_a_choice_of_every_recipe(name: str, rounding: str) -> None:
    made, plain = make_recipe(f"{name}-dynamic{rounding}-w4a8"), make_recipe(f"{name}{rounding}-w4a8")
    assert Recipe.parse(str(made)) == made
    assert step(made, "quantize-linears").activation_range is InputRange.DYNAMIC
    learned = [one for one in made.convert if one.name == "reconstruct-blocks"]
    assert all(one.activation_range is InputRange.DYNAMIC for one in learned)
    changed = plain.with_options("quantize-linears", activation_range="dynamic")
    if learned:
        changed = changed.with_options("reconstruct-blocks", activation_range="dynamic")
    static = ("choose-variants", "bin-ranges")  # Nothing is left to choose, and no range depends on the timestep.
    left = tuple(one for one in changed.convert if one.name not in static)
    assert made == Recipe(changed.prepare, left)
    assert step(made, "quantize-convolutions") == step(plain, "quantize-convolutions")


@pytest.mark.parametrize("name", ["ptq4dit-gptq-dynamic", "dynamic-dynamic", "ptq4dit-dynamic-dynamic", "-dynamic"])
def test_names_in_another_order(name: str) -> None:
    with pytest.raises(UnknownNameError):
        make_recipe(f"{name}-w4a8")


@pytest.mark.parametrize(("name", "right"), [("rtn-w04a8", "w4a8"), ("ptq4dit-gptq-w4a16-g064", "w4a16-g64")])
def test_another_spelling_of_a_precision(name: str, right: str) -> None:
    with pytest.raises(ConfigurationError, match=f"is not a precision; write {right}$"):
        make_recipe(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rtn-wnvfp4", r"'wnvfp4' is not a precision; .* Did you mean wnvfp4anvfp4 or wnvfp4a16\?$"),
        ("svdquant-bins-w8", r"'w8' is not a precision; .* Did you mean w8a8 or w8a16\?$"),
        ("smoothquant-search-W4A8", r"Did you mean w4a8\?$"),
        ("svdquant-gptq-w4a4-rank16", "'w4a4-rank16' is not a precision; write w4a8"),
        ("rtn-w4a4g32", r"Did you mean w4a4-g32\?$"),
    ],
)
def test_what_stands_in_the_place_of_a_precision_is_named(name: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make_recipe(name)


@pytest.mark.parametrize("name", ["rotate-channels", "split-low-rank", "quantize-linears", "balance-channels"])
def test_passes_that_need_calibration_come_after_it(name: str) -> None:
    text = f"remove-no-ops,assign-precision{{precision=w4a8}},{name} ; quantize-embeddings"
    with pytest.raises(ConfigurationError, match=f"^{name} comes before calibration .* behind the semicolon"):
        make_recipe(text)


@pytest.mark.parametrize("name", own_recipes())
def test_rounding_is_a_choice_of_every_recipe(name: str) -> None:
    assert step(make_recipe(f"{name}-gptq-w4a8"), "quantize-linears").rounding is Rounding.GPTQ
    assert step(make_recipe(f"{name}-adaround-w4a8"), "quantize-linears").rounding is Rounding.ADAROUND
    default = Rounding.GPTQ if name == "auto" else Rounding.NEAREST
    assert step(make_recipe(f"{name}-w4a8"), "quantize-linears").rounding is default


def test_what_is_chosen_is_rounded_as_the_recipe_says() -> None:
    for rounding in (Rounding.GPTQ, Rounding.ADAROUND):
        assert step(make_recipe(f"auto-{rounding.value}-w4a8"), "choose-variants").rounding is rounding
    learned = make_recipe("auto-reconstruct-w4a8")  # Weights that are rounded before would not be learned.
    assert step(learned, "choose-variants").rounding is Rounding.NEAREST
    assert step(learned, "reconstruct-blocks")
    assert "choose-variants" not in str(make_recipe("auto-dynamic-w4a8"))
    assert str(make_recipe("auto-w4a16")) == str(make_recipe("ptq4dit-gptq-w4a16"))
    passes = {bits: [one.name for one in make_recipe(f"auto-{bits}").convert] for bits in ("w8a8", "w4a8", "w4a4")}
    added = {bits: {"rotate-channels", "split-low-rank"} & {*names} for bits, names in passes.items()}
    assert added["w8a8"] == added["w4a8"] == {"split-low-rank"}
    assert added["w4a4"] == {"rotate-channels", "split-low-rank"}
    assert step(make_recipe("auto-w8a8"), "split-low-rank") == SplitLowRank(rank=16, branch=BranchType.HALF)
    wide = SplitLowRank(rank=32, iterations=4, branch=BranchType.HALF)
    assert all(step(make_recipe(f"auto-{bits}"), "split-low-rank") == wide for bits in ("w4a8", "wfp8afp8"))


def test_bins_follow_the_branch_that_follows_balancing() -> None:
    made = make_recipe("svdquant-bins-w8a8")
    names = [one.name for one in made.convert]
    order = ["balance-channels", "absorb-affines", "split-low-rank", "bin-ranges", "quantize-linears"]
    assert [name for name in names if name in order] == order
    assert step(made, "split-low-rank") == SplitLowRank(rank=16, branch=BranchType.HALF)
    assert step(made, "quantize-linears").activation_range is InputRange.MINMAX


def test_reconstruction_begins_with_the_ranges_that_the_recipe_searches() -> None:
    learned = make_recipe("ptq4dit-reconstruct-w4a8")
    names = [one.name for one in learned.convert]
    assert names.index("reconstruct-blocks") == names.index("quantize-linears") - 1
    found = step(learned, "reconstruct-blocks")
    assert (found.weight_range, found.activation_range) == (RangeSearch.PERCENTILE, InputRange.PERCENTILE)
    assert found.iterations == 20_000


def test_q_diffusion_reconstructs_without_balancing() -> None:
    names = [one.name for one in make_recipe("q-diffusion-w4a8").convert]
    assert "reconstruct-blocks" in names
    assert "balance-channels" not in names
    assert step(make_recipe("q-diffusion-reconstruct-w4a8"), "reconstruct-blocks")  # Once is enough.


def test_options_of_one_pass_change_and_nothing_else() -> None:
    plain = make_recipe("ptq4dit-w4a8")
    changed = plain.with_options("balance-channels", exponent=0.4, salience="max")
    assert "balance-channels{exponent=0.4 salience=max}" in str(changed)
    assert str(changed).replace("balance-channels{exponent=0.4 salience=max}", "balance-channels") == str(plain)
    assert step(plain.with_options("quantize-linears", rounding=Rounding.GPTQ), "quantize-linears") == step(
        make_recipe("ptq4dit-gptq-w4a8"), "quantize-linears"
    )
    assert "layers=all" in str(plain.with_options("assign-precision", layers="all"))


def test_the_text_of_a_recipe_will_do_for_its_name() -> None:
    made = make_recipe("ptq4dit-w4a8").with_options("balance-channels", exponent=0.4)
    assert make_recipe(str(made)) == made


def test_options_that_there_are_not() -> None:
    plain = make_recipe("rtn-w4a8")
    with pytest.raises(ConfigurationError, match=r"no pass 'balance-channels'; its passes: remove-no-ops"):
        plain.with_options("balance-channels", exponent=0.4)
    with pytest.raises(ConfigurationError, match="has no option 'roundings=gptq'"):
        plain.with_options("quantize-linears", roundings="gptq")
    with pytest.raises(ConfigurationError, match="cannot be read as Rounding"):
        plain.with_options("quantize-linears", rounding="up")


def test_names_that_there_are_not() -> None:
    with pytest.raises(UnknownNameError):
        make_recipe("ptq4dit-up-w4a8")
    with pytest.raises(UnknownNameError):
        make_recipe("gptq-w4a8")
    with pytest.raises(ConfigurationError, match="lacks a precision"):
        make_recipe("ptq4dit")
