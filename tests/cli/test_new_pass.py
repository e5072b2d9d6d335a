"""``fxquant new-pass``: the package that it writes works at once, and names that cannot be are refused."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from importlib.resources import files
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fxquant.cli.__main__ import app
from fxquant.cli.new_pass import check_name, class_name, write_package
from fxquant.errors import ConfigurationError
from fxquant.pipeline.pipeline import PASSES, parse_pass

ROOT = Path(__file__).parents[2]
TEMPLATE = Path(str(files("fxquant.cli"))) / "templates" / "new-pass"


@pytest.mark.slow
def test_the_tests_of_a_new_package_pass(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    made = CliRunner().invoke(app, ["new-pass", "halve-my-weights", "--out", str(folder)])
    assert made.exit_code == 0, made.output
    assert "pip install -e '.[test]'" in made.stdout
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error::pytest.PytestWarning"]
    command += ["-p", "tests.sharing"]  # Takes less time, and computes the same.
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "5 passed" in ran.stdout


def test_every_file_has_the_name_of_the_pass(tmp_path: Path) -> None:
    write_package("halve-my-weights", tmp_path / "made")
    made = {path.relative_to(tmp_path / "made").as_posix(): path for path in (tmp_path / "made").rglob("*")}
    assert {path.as_posix() for path in map(Path, made) if made[path.as_posix()].is_file()} == {
        "README.md",
        "pyproject.toml",
        "fxquant_halve_my_weights/__init__.py",
        "fxquant_halve_my_weights/halve_my_weights.py",
        "tests/halve_my_weights.txt",
        "tests/test_halve_my_weights.py",
    }
    text = "".join(path.read_text() for path in made.values() if path.is_file())
    assert not any(word in text for word in ("my-pass", "my_pass", "MyPass"))
    assert "class HalveMyWeights(Pass)" in text and 'of="halve-my-weights"' in text


def test_the_entry_point_names_the_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_package("halve", tmp_path / "made")
    table = tomllib.loads((tmp_path / "made" / "pyproject.toml").read_text())
    ((name, value),) = table["project"]["entry-points"]["fxquant.passes"].items()
    monkeypatch.syspath_prepend(str(tmp_path / "made"))
    monkeypatch.setattr(PASSES, "_objects", dict(PASSES._objects))
    monkeypatch.setattr(PASSES, "_pending", {**PASSES._entries(), name: EntryPoint(name, value, "fxquant.passes")})
    assert str(parse_pass("halve{factor=8.0}")) == "halve{factor=8.0}"


@pytest.mark.parametrize("name", ["none", "true", "tier", "pass-context", "scaling", "my-pass", "halve"])
def test_the_class_has_a_name_of_its_own(name: str, tmp_path: Path) -> None:
    write_package(name, tmp_path / "made")
    (file,) = (tmp_path / "made").glob("fxquant_*/[a-z]*.py")
    made = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef)]
    imported = {
        alias.name
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert [node.name for node in made] == ["Scaling", class_name(name)]
    assert class_name(name) not in {"Scaling", *imported}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("RotateInputs", "write lower-case words with hyphens: rotate-inputs"),
        ("rotate_inputs", "write lower-case words with hyphens: rotate-inputs"),
        ("8-bit", "write lower-case words with hyphens: bit"),
        ("../up", "write lower-case words with hyphens: up"),
        ("", "write lower-case words with hyphens: rotate-inputs"),
        ("quantize-linears", "there is a pass 'quantize-linears' already; choose another name"),
        ("lambda", "'lambda' is a word of Python; choose another name, such as lambda-inputs"),
    ],
)
def test_names_that_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        check_name(name)


def test_what_exists_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    result = CliRunner().invoke(app, ["new-pass", "halve", "--out", str(folder)])
    assert result.exit_code == 2 and "exists already; choose another folder with --out" in " ".join(
        result.stderr.split()
    )
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_the_template_has_no_leftovers() -> None:
    """Python files of the template are linted and run as they are; only their words are replaced."""
    assert all("my_pass" in path.name for path in TEMPLATE.glob("fxquant*"))
    assert {path.suffix for path in TEMPLATE.rglob("*") if path.is_file()} - {".pyc"} == {".md", ".py", ".toml", ".txt"}
