"""The recipes, and that pip finds passes and recipes."""

import tomllib
from importlib import import_module
from pathlib import Path

from example_passes import recipes

from fxquant.authoring import Pass, Precision, Recipe


def test_the_pass_comes_before_rounding() -> None:
    found = recipes.low_rank(Precision.parse("w4a4"), "default")
    names = [step.name for step in found.convert]
    assert names.index("absorb-affines") < names.index("low-rank-branch") == names.index("quantize-linears") - 1
    assert Recipe.parse(str(found)) == found
    assert "choose-bits{mean=6.0}" in str(recipes.mixed(Precision.parse("w6a8"), "all"))


def test_the_entry_points_exist() -> None:
    table = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["entry-points"]
    for name, value in table["fxquant.passes"].items():
        module, _, attribute = value.partition(":")
        cls = getattr(import_module(module), attribute)
        assert issubclass(cls, Pass) and cls.name == name
    for value in table["fxquant.recipes"].values():
        module, _, attribute = value.partition(":")
        assert isinstance(getattr(import_module(module), attribute)(Precision.parse("w6a8"), "default"), Recipe)
