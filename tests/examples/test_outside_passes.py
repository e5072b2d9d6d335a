"""The outside package in ``examples/passes``: it uses public names only, and its own tests pass."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "examples" / "passes"
PUBLIC = {"fxquant", "fxquant.authoring", "fxquant.testing", "fxquant.errors"}
LONGEST = {"rotate_inputs": 203, "low_rank_branch": 99, "choose_bits": 103, "float8": 173}
"""Lines of the same passes when they had to be written with private names."""


def imported(file: Path) -> set[str]:
    """Names of the modules of fxquant that a file imports, in any form."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module))
    return {name for name in found if name.split(".")[0] == "fxquant"}


@pytest.mark.parametrize("file", [*PACKAGE.glob("*/*.py")], ids=lambda file: file.stem)
def test_only_public_names_are_imported(file: Path) -> None:
    assert imported(file) <= PUBLIC


def test_the_check_of_imports_sees_private_names(tmp_path: Path) -> None:
    file = tmp_path / "private.py"
    file.write_text("import fxquant.ir.rewriter\ndef f():\n    from fxquant.pipeline.pipeline import Pass\n")
    assert imported(file) == {"fxquant.ir.rewriter", "fxquant.pipeline.pipeline"}


@pytest.mark.parametrize("name", LONGEST)
def test_passes_are_shorter_than_with_private_names(name: str) -> None:
    assert len((PACKAGE / "example_passes" / f"{name}.py").read_text().splitlines()) < LONGEST[name]


def test_the_tests_of_the_package_pass() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    ran = subprocess.run(command, cwd=PACKAGE, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
