from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from fxquant import registry
from fxquant.errors import DuplicateNameError, PluginError, UnknownNameError
from fxquant.pipeline.pipeline import PASSES
from fxquant.registry import Registry


class Thing:
    """Something to register."""


def entry(name: str, value: str) -> EntryPoint:
    return EntryPoint(name, value, "tests.things")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[EntryPoint]:
    points: list[EntryPoint] = []
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == "tests.things" else [])
    return points


def things() -> Registry[type]:
    return Registry("thing", "tests.things")


def test_what_is_registered_is_found() -> None:
    found: Registry[type] = Registry("thing")
    assert found.register("one")(Thing) is Thing
    assert found["one"] is Thing
    assert "one" in found
    assert "two" not in found
    assert (list(found), len(found)) == (["one"], 1)


def test_an_unknown_name_lists_the_known_ones() -> None:
    found: Registry[type] = Registry("thing")
    with pytest.raises(UnknownNameError, match=r"unknown thing 'one'. Known: none."):
        found["one"]
    found.register("b")(Thing)
    found.register("a")(Thing)
    with pytest.raises(UnknownNameError, match=r"unknown thing 'one'. Known: a, b.") as error:
        found["one"]
    assert isinstance(error.value, LookupError)


def test_a_duplicate_is_refused() -> None:
    found: Registry[type] = Registry("thing")
    found.register("one")(Thing)
    with pytest.raises(DuplicateNameError, match=r"thing 'one' is already registered by .*Thing"):
        found.register("one")(dict)
    assert found["one"] is Thing


def test_entry_points_are_loaded_when_asked_for(installed: list[EntryPoint]) -> None:
    installed += [entry("ordered", "collections:OrderedDict"), entry("broken", "no_such_module:Thing")]
    found = things()
    assert list(found) == ["broken", "ordered"]  # Nothing is imported to list them.
    assert "broken" in found
    assert found["ordered"].__name__ == "OrderedDict"
    with pytest.raises(PluginError, match="no_such_module"):
        found["broken"]


def test_code_may_not_take_a_name_that_is_installed(installed: list[EntryPoint]) -> None:
    installed.append(entry("ordered", "collections:OrderedDict"))
    with pytest.raises(DuplicateNameError, match="'ordered' is already registered by EntryPoint"):
        things().register("ordered")(Thing)


def test_a_module_that_decorates_what_its_entry_point_names_is_no_duplicate(installed: list[EntryPoint]) -> None:
    installed.append(entry("thing", f"{Thing.__module__}:Thing"))
    found = things()
    found.register("thing")(Thing)
    assert found["thing"] is Thing


def test_two_packages_with_one_name_are_refused(installed: list[EntryPoint]) -> None:
    installed += [entry("one", "collections:OrderedDict"), entry("one", "collections:Counter")]
    with pytest.raises(DuplicateNameError, match="offer thing 'one': collections:OrderedDict and collections:Counter"):
        list(things())


def test_the_same_entry_point_twice_is_one(installed: list[EntryPoint]) -> None:
    installed += [entry("one", "collections:OrderedDict")] * 2
    assert list(things()) == ["one"]


def test_what_is_built_in_goes_the_same_road() -> None:
    assert {"absorb-affines", "balance-channels", "quantize-linears"} <= set(PASSES)
    assert PASSES["balance-channels"].__module__ == "fxquant.passes.balance_channels"
    assert all(PASSES[name].name == name for name in PASSES)
