"""The outside package in ``examples/passes``: it uses public names only, and its own tests pass."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
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


_QUICK = "not lifecycle or float8 or powers"
_SLOW = "lifecycle and not float8 and not powers"


@pytest.mark.slow
@pytest.mark.parametrize("those", [_QUICK, pytest.param(_SLOW, marks=pytest.mark.exhaustive)])
def test_the_tests_of_the_package_pass(those: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.sharing", "-k", those]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, cwd=PACKAGE, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_pip_installs_it_with_its_entry_points(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(PACKAGE, source, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation"]
    built = subprocess.run([*command, "--wheel-dir", tmp_path, source], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("fxquant_example_passes-*.whl")
    with zipfile.ZipFile(wheel) as files:
        names = set(files.namelist())
        (table,) = (name for name in names if name.endswith("/entry_points.txt"))
        text = files.read(table).decode()
    assert {f"example_passes/{name}.py" for name in ("__init__", *LONGEST)} <= names
    assert not any(name.startswith("tests/") for name in names)
    assert "[fxquant.passes]" in text and "low-rank-branch = example_passes.low_rank_branch:LowRankBranch" in text
    assert "[fxquant.formats]" in text and "pow4 = example_passes.powers:POW4" in text
    assert "[fxquant.recipes]" in text
