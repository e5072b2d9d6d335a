"""Commands that the documentation shows exist, with these options and these kinds of values."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import pytest
import typer

from fxquant.cli.__main__ import app
from tests.docs.pages import ROOT, commands_of, inline_of, pages

GROUP: Any = typer.main.get_command(app)
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), flags=re.M))


@pytest.mark.parametrize("page", pages())
def test_commands_parse(page: str) -> None:
    for name, *words in commands_of(page, "fxquant"):
        assert name in GROUP.commands, f"{page} shows fxquant {name}"
        GROUP.commands[name].make_context(name, words)  # Raises a UsageError that says what is wrong.
    for name, *words in inline_of(page, "fxquant"):
        if name.startswith("-") or name.isupper():
            continue
        assert name in GROUP.commands, f"{page} mentions fxquant {name}"
        known = {option for one in GROUP.commands[name].params for option in (*one.opts, *one.secondary_opts)}
        assert {word for word in words if word.startswith("-")} <= known | {"--help"}, page


@pytest.mark.parametrize("page", pages())
def test_targets_of_make_exist(page: str) -> None:
    for words in (*commands_of(page, "make"), *inline_of(page, "make")):
        named = {word for word in words if "=" not in word and re.fullmatch(r"[a-z-]+", word)}
        assert named <= TARGETS, page


@pytest.mark.parametrize("page", pages())
def test_modules_exist(page: str) -> None:
    installed = {word for words in inline_of(page, "pip") if words[0] == "install" for word in words[1:]}
    for words in (*commands_of(page, "python"), *inline_of(page, "python")):
        if words[0] == "-m" and words[1] not in installed:
            assert importlib.util.find_spec(words[1]), f"{page} runs {words[1]}"


def test_commands_that_launchers_start_are_found() -> None:
    found = [words[0] for words in commands_of("docs/distributed.md", "fxquant")]
    assert found == [*["quantize"] * 5, "merge-statistics", "quantize"]
    assert ["eval"] in list(inline_of("docs/evaluation.md", "fxquant"))


def test_a_wrong_command_is_found() -> None:
    with pytest.raises(Exception, match=r"(?i)no such option"):
        GROUP.commands["report"].make_context("report", ["folder", "--colour"])
    with pytest.raises(Exception, match="some"):
        GROUP.commands["quantize"].make_context("quantize", ["model", "--out", "out", "--layers", "some"])
