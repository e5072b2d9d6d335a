"""Packages of others that are installed beside ours: used like ours, kept out of our own tests, named if broken."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fxquant.cli.__main__ import app
from fxquant.errors import PluginError
from fxquant.pipeline.backend import BACKENDS
from fxquant.pipeline.pipeline import PASSES, parse_pass
from fxquant.pipeline.recipes import RECIPES, make_recipe
from fxquant.testing import own_backends, own_passes, own_recipes

SOURCE = """
from dataclasses import dataclass
from typing import ClassVar
from fxquant.pipeline.pipeline import Pass, Tier, register_pass
from fxquant.pipeline.recipes import make_recipe
from fxquant.ir.stages import Stage

@register_pass
@dataclass(frozen=True)
class Idle(Pass):
    '''Does nothing.'''
    name: ClassVar[str] = "outside-idle"
    tier: ClassVar[Tier] = Tier.EXACT
    requires: ClassVar[Stage] = Stage.QUANTIZED
    establishes: ClassVar[Stage] = Stage.CAPTURED
    sizes: tuple[int, ...] = (1, 2)

    def run(self, graph, context, rewriter):
        pass

class Plain:
    pass

class Unnamed(Idle):
    tier = None

def outside(precision, layers):
    '''The recipe of others.'''
    return make_recipe(f"rtn-{precision}", layers)
"""

METADATA = "Metadata-Version: 2.1\nName: outsiders\nVersion: 1\n"
ENTRIES = """
[fxquant.passes]
outside-idle = outside_of_fxquant:Idle
outside-broken = outside_that_breaks:Broken
outside-missing = outside_of_fxquant:Missing
outside-exits = outside_that_exits:Exits
outside-plain = outside_of_fxquant:Plain
outside-module = outside_of_fxquant
outside-untiered = outside_of_fxquant:Unnamed
outside-renamed = outside_of_fxquant:Idle
[fxquant.recipes]
outside = outside_of_fxquant:outside
[fxquant.backends]
outside-backend = outside_that_breaks:Backend
"""


@pytest.fixture
def outsiders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of others with a pass, a recipe and parts that cannot be imported, as pip installs it."""
    (tmp_path / "outside_of_fxquant.py").write_text(SOURCE)
    (tmp_path / "outside_that_breaks.py").write_text("import a_module_that_is_not_there\n")
    (tmp_path / "outside_that_exits.py").write_text("import sys\nsys.exit('no licence')\n")
    info = tmp_path / "outsiders-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(METADATA)
    (info / "entry_points.txt").write_text(ENTRIES)
    monkeypatch.syspath_prepend(str(tmp_path))
    for known in (PASSES, RECIPES, BACKENDS):
        monkeypatch.setattr(known, "_objects", dict(known._objects))
        monkeypatch.setattr(known, "_pending", None)
    for name in ("outside_of_fxquant", "outside_that_breaks", "outside_that_exits"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_they_are_known_and_kept_out_of_our_own_tests(outsiders: None) -> None:
    ours = own_passes(), own_recipes(), own_backends()
    assert "outside_of_fxquant" not in sys.modules  # Nothing of others is imported for that.
    assert {"outside-idle", "outside-broken"} <= set(PASSES) and "outside" in RECIPES and "outside-backend" in BACKENDS
    assert not any(name.startswith("outside") for names in ours for name in names)
    assert (len(ours[0]), "rtn" in ours[1], ours[2]) == (20, True, ["fake-quant", "native", "torchao"])
    assert str(parse_pass("outside-idle{sizes=[3]}")) == "outside-idle{sizes=[3]}"
    assert make_recipe("outside-w4a8") == make_recipe("rtn-w4a8")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("outside-broken", "ModuleNotFoundError: No module named 'a_module_that_is_not_there'"),
        ("outside-missing", "AttributeError: .*has no attribute 'Missing'"),
        ("outside-exits", "SystemExit: no licence"),
        ("outside-plain", "ConfigurationError: .*Plain.* is not a subclass of fxquant.authoring.Pass"),
        ("outside-module", "ConfigurationError: .*module 'outside_of_fxquant'.* is not a subclass"),
        ("outside-untiered", "ConfigurationError: the pass Unnamed does not say its tier"),
        ("outside-renamed", "the pass Idle is called 'outside-idle', and its entry point 'outside-renamed'"),
    ],
)
def test_one_that_cannot_be_imported_is_named_and_the_rest_works(outsiders: None, name: str, why: str) -> None:
    with pytest.raises(
        PluginError, match=f"the pass '{name}' of the package outsiders cannot be imported from .*: {why}"
    ):
        parse_pass(name)
    assert parse_pass("remove-no-ops").name == "remove-no-ops"


def test_a_list_names_those_that_cannot_be_imported(outsiders: None) -> None:
    shown = CliRunner().invoke(app, ["list", "passes"], env={"COLUMNS": "300"}).output
    assert "outside-idle" in shown and "[exact] Does nothing." in shown
    reason = "not available: the pass 'outside-broken' of the package outsiders cannot be imported"
    assert reason in " ".join(shown.split())
    backends = CliRunner().invoke(app, ["list", "backends"], env={"COLUMNS": "300"}).output
    assert "outside-backend" in backends and "torchao" in backends
