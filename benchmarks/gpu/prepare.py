"""Makes a virtual environment for ``benchmarks/gpu/measure.sh`` from carried wheels, without access to packages.

    python -m benchmarks.gpu.prepare wheels

The environment sees the packages of the present interpreter, such as torch. Only wheels of packages that are missing
there, or too old for what needs them, are installed, and fxquant from this folder. The last line of the output is the
environment's interpreter.
"""

from __future__ import annotations

import argparse
import site
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from email import message_from_bytes
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = ROOT / "build/measure/venv"
OPTIONAL = ("torchao", "pytest-xdist", "hypothesis")
"""Packages without which less is measured, or slower."""


@dataclass(frozen=True)
class Wheel:
    """A carried wheel.

    Attributes:
        path: The file.
        version: Its version.
        requires: What it requires on this machine.
    """

    path: Path
    version: str
    requires: tuple[Requirement, ...]


class Damaged(Exception):
    """A file of the folder is not a wheel."""


def read(folder: Path) -> dict[str, Wheel]:
    """The wheels of a folder by name.

    Raises:
        Damaged: If a file cannot be read, or there are two versions of a package.
    """
    found: dict[str, Wheel] = {}
    for path in sorted(folder.glob("*.whl")):
        try:
            name, version, _, _ = parse_wheel_filename(path.name)
            with zipfile.ZipFile(path) as file:
                inside = next(it for it in file.namelist() if it.endswith(".dist-info/METADATA"))
                metadata = message_from_bytes(file.read(inside))
        except (ValueError, StopIteration, zipfile.BadZipFile, OSError) as error:
            raise Damaged(f"{path} is not a wheel ({error}); collect it again with `make gpu-wheels`") from error
        if name in found:
            raise Damaged(f"{folder} has two wheels of {name}; remove one")
        requires = map(Requirement, metadata.get_all("Requires-Dist") or ())
        found[name] = Wheel(path, str(version), tuple(it for it in requires if _applies(it)))
    return found


def _applies(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def choose(
    wanted: Iterable[Requirement], present: Mapping[str, str], wheels: Mapping[str, Wheel]
) -> tuple[list[Wheel], list[Requirement]]:
    """The wheels to install, and what is missing.

    Args:
        wanted: What is required.
        present: Versions of the packages of the machine.
        wheels: The carried wheels.
    """
    chosen: dict[str, Wheel] = {}
    missing: list[Requirement] = []
    queue = list(wanted)
    while queue:
        requirement = queue.pop(0)
        name = canonicalize_name(requirement.name)
        found = chosen[name].version if name in chosen else present.get(name)
        if found is not None and requirement.specifier.contains(found, prereleases=True):
            continue
        wheel = wheels.get(name)
        if name in chosen or wheel is None or not requirement.specifier.contains(wheel.version, prereleases=True):
            missing.append(requirement)
            continue
        chosen[name] = wheel
        queue += wheel.requires
    return list(chosen.values()), missing


def requirements() -> list[Requirement]:
    """What fxquant, its device tests and the peers require."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    texts = [*project["dependencies"], "triton>=3.6", "setuptools>=77.0.3", "pytest>=8.4", *OPTIONAL]
    return [Requirement(text) for text in texts]


def make(environment: Path, wheels: Sequence[Wheel]) -> Path:
    """Make the environment and return its interpreter.

    Raises:
        subprocess.CalledProcessError: If pip fails.
    """
    run = [sys.executable, "-m"]
    subprocess.run([*run, "venv", "--without-pip", "--clear", str(environment)], check=True)
    python = environment / "bin" / "python"
    purelib = Path(sysconfig.get_path("purelib", "venv", {"base": str(environment), "platbase": str(environment)}))
    # `venv --system-site-packages` would show the packages of the system's interpreter, also where the present one is
    # that of another virtual environment.
    outer = dict.fromkeys(path for path in (*site.getsitepackages(), site.getusersitepackages()) if Path(path).is_dir())
    (purelib / "outer.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in outer))
    pip = [*run, "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps", "--no-compile",
           "--disable-pip-version-check", "--ignore-installed"]  # fmt: skip
    if wheels:
        subprocess.run([*pip, *(str(wheel.path) for wheel in wheels)], check=True, stdout=sys.stderr)
    subprocess.run([*pip, "--no-build-isolation", "--editable", str(ROOT)], check=True, stdout=sys.stderr)
    return python


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.prepare", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("wheels", type=Path, help="folder of wheels, as `make gpu-wheels` collects them")
    options = parser.parse_args()
    if not options.wheels.is_dir():
        parser.error(f"there is no folder {options.wheels}; collect wheels with `make gpu-wheels`")
    try:
        wheels = read(options.wheels)
    except Damaged as error:
        parser.error(str(error))
    present: dict[str, str] = {}
    for found in distributions():
        present.setdefault(canonicalize_name(found.metadata["Name"]), found.version)
    chosen, missing = choose(requirements(), present, wheels)
    needed = [it for it in missing if canonicalize_name(it.name) not in OPTIONAL]
    for it in missing:
        here = present.get(canonicalize_name(it.name))
        more = f", and {here} is here" if here else ""
        print(f"missing: {it}{more}" + ("" if it in needed else "; what needs it is left out"), file=sys.stderr)
    if needed:
        parser.error(f"{options.wheels} lacks wheels of what is missing; collect them with `make gpu-wheels`")
    try:
        python = make(ENVIRONMENT, chosen)
    except subprocess.CalledProcessError as error:
        parser.error(f"the environment cannot be made: {' '.join(map(str, error.cmd))} failed")
    print(
        f"installed from wheels: {', '.join(it.path.name.split('-')[0] for it in chosen) or 'nothing'}", file=sys.stderr
    )
    print(python)
    return 0


if __name__ == "__main__":
    sys.exit(main())
