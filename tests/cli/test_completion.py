"""Shell completion: the script, and the names that are completed."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

import fxquant
from fxquant.cli import completion
from fxquant.pipeline.backend import BACKENDS
from fxquant.pipeline.pipeline import PASSES
from fxquant.pipeline.recipes import RECIPES


def completed(words: str) -> list[str]:
    """What bash is offered behind these words."""
    environment = os.environ | {
        "_FXQUANT_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    command = [sys.executable, "-c", "from fxquant.cli.__main__ import app; app(prog_name='fxquant')"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("fxquant quan", ["quantize"]),
        ("fxquant quantize --recipe smoothquant-w", [f"smoothquant-w{p}" for p in ("8a8", "4a8", "8a16", "4a16")]),
        ("fxquant quantize --backend na", ["native"]),
        ("fxquant opt --passes absorb-affines,balance", ["absorb-affines,balance-channels"]),
    ],
)
def test_what_bash_completes(words: str, expected: list[str]) -> None:
    assert completed(words) == expected


def test_all_names_are_offered() -> None:
    for offered, registered in ((completion.backends(""), BACKENDS), (completion.passes(""), PASSES)):
        # What a module registers when it is imported, such as the module of another test, no shell knows.
        assert offered == [name for name in registered if name in offered] and len(offered) >= 3
    assert completion.passes("") == sorted(point.name for point in entry_points(group="fxquant.passes"))
    assert {name.rpartition("-")[0] for name in completion.recipes("")} == set(RECIPES)


def test_recipes_that_are_offered_can_be_made() -> None:
    for name in completion.recipes("rtn") + completion.recipes("htg"):
        assert str(fxquant.make_recipe(name))


def test_the_script_can_be_shown() -> None:
    environment = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [sys.executable, "-c", "from fxquant.cli.__main__ import app; app(prog_name='fxquant')"]
    done = subprocess.run(
        [*command, "--show-completion", "bash"], env=environment, capture_output=True, text=True, check=True
    )
    assert "_FXQUANT_COMPLETE=complete_bash" in done.stdout
