"""What is installed under which name: the wheel, and the environment that the tests run in."""

import importlib
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Folder in the repository -> folder in the wheel.
FOLDERS = {"fxquant": "fxquant", "passes": "fxquant/passes", "backends": "fxquant/backends"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel of a copy of the sources, so that nothing an earlier build left behind gets into it."""
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, source)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation"]
    built = subprocess.run([*command, "--wheel-dir", dist, source], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (file,) = dist.glob("fxquant-*.whl")
    return zipfile.ZipFile(file)


@pytest.mark.slow
def test_wheel_holds_every_source_file(wheel: zipfile.ZipFile) -> None:
    expected = {
        f"{installed}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, installed in FOLDERS.items()
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and file.suffix not in {".pyc", ".md"}
    }
    missing = expected - set(wheel.namelist())
    assert not missing, "not in the wheel: no __init__.py beside it, or a suffix that package-data does not name"


def test_wheel_has_one_top_level_name(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fxquant"}
    assert {"fxquant/passes/__init__.py", "fxquant/backends/__init__.py"} <= set(wheel.namelist())


def test_entry_points_name_modules_of_the_wheel(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    (table,) = (name for name in names if name.endswith(".dist-info/entry_points.txt"))
    parser = ConfigParser(delimiters="=")
    parser.read_string(wheel.read(table).decode())
    groups = [group for group in parser.sections() if group.startswith("fxquant.")]
    modules = {value.split(":")[0].strip().replace(".", "/") for group in groups for value in parser[group].values()}
    missing = {module for module in modules if not {f"{module}.py", f"{module}/__init__.py"} & names}
    assert not missing


def test_unpacked_wheel_resolves_alone(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    code = (
        "import sys, importlib.util as u; sys.path.insert(0, sys.argv[1]);"
        "print(u.find_spec('fxquant.passes').origin, u.find_spec('fxquant.backends').origin, sep='\\n');"
        "print(u.find_spec('passes'), u.find_spec('backends'))"
    )
    command = [sys.executable, "-I", "-c", code, str(tmp_path)]
    passes, backends, plain = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert Path(passes) == tmp_path / "fxquant/passes/__init__.py"
    assert Path(backends) == tmp_path / "fxquant/backends/__init__.py"
    assert plain == "None None"


@pytest.mark.parametrize(("folder", "module"), [("passes", "fxquant.passes"), ("backends", "fxquant.backends")])
def test_this_environment_resolves(folder: str, module: str) -> None:
    file = importlib.import_module(module).__file__
    assert file is not None
    assert Path(file).samefile(ROOT / folder / "__init__.py")


def test_wheel_installs_without_a_compiler(wheel: zipfile.ZipFile) -> None:
    """Kernels are shipped as sources and compiled at first use, so one wheel serves all platforms and versions."""
    assert wheel.filename is not None
    assert wheel.filename.endswith("-py3-none-any.whl")
    assert not [name for name in wheel.namelist() if name.endswith((".so", ".pyd", ".dll", ".o"))]
    (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    text = wheel.read(metadata).decode()
    assert "Requires-Python: >=3.11" in text
    assert all(f"Python :: 3.{minor}\n" in text for minor in (11, 12, 13))
