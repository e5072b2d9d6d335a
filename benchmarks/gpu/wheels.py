"""Collects the wheels that a machine without access to packages needs for ``benchmarks/gpu/measure.sh``.

    python -m benchmarks.gpu.wheels out/wheels --python 3.12

Versions are those of ``constraints.txt``. torch, Triton and CUDA's packages are never collected: the machine has them.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WANTED = (
    "diffusers", "torchao", "pydantic", "networkx", "rich", "tabulate", "typer", "pytest", "pytest-xdist", "hypothesis",
)  # fmt: skip
"""What fxquant, the peers and the tests need. None of these requires torch, which pip would download."""
NEVER = re.compile(r"(torch|torchvision|torchaudio|triton|pytorch-triton|nvidia-.*|cuda-.*|cupy-.*)$")
"""Packages that belong to the build of torch of a machine."""
PRESENT = ("numpy", "pillow", "scipy", "hf-xet", "setuptools")
"""Large packages that machines with torch have, left out by default."""
PLATFORMS = tuple(f"manylinux{name}_x86_64" for name in ("_2_28", "_2_27", "_2_24", "_2_17", "2014", "2010", "1"))
MOST_BYTES = 60 << 20


class NoWheels(Exception):
    """The wheels cannot be collected; the message says why."""


def normal(name: str) -> str:
    """The name of a package as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def collect(folder: Path, python: str, without: tuple[str, ...]) -> list[Path]:
    """Download wheels into a folder, whose earlier wheels are replaced.

    Args:
        folder: The folder.
        python: Version of the machine's Python, such as ``3.12``.
        without: Packages that the machine has.

    Raises:
        NoWheels: If pip finds no wheel, or the wheels are too large together. The folder is left as it was.
    """
    with tempfile.TemporaryDirectory() as text:
        new = Path(text)
        platforms = [option for name in PLATFORMS for option in ("--platform", name)]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--implementation", "cp",
                   "--python-version", python, *platforms, "--constraint", str(ROOT / "constraints.txt"),
                   "--dest", str(new), *WANTED]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if not line.startswith("WARNING")]
            raise NoWheels("pip cannot collect the wheels: " + " ".join(lines[-3:]))
        return place(sorted(new.glob("*.whl")), folder, without)


def place(wheels: list[Path], folder: Path, without: tuple[str, ...]) -> list[Path]:
    """Copy the wheels that are wanted into a folder, in place of those that are there.

    Raises:
        NoWheels: If they are too large together.
    """
    left_out = set(map(normal, without))
    kept = [it for it in wheels if (name := normal(it.name.split("-")[0])) not in left_out and not NEVER.match(name)]
    size = sum(wheel.stat().st_size for wheel in kept)
    if size > MOST_BYTES:
        raise NoWheels(f"the wheels have {size >> 20} MiB, over {MOST_BYTES >> 20}; leave out more with --without")
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    return [Path(folder / wheel.name) for wheel in kept if (folder / wheel.name).write_bytes(wheel.read_bytes())]


def main() -> int:
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.wheels", description=about)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="version of the machine's Python; default 3.12")
    parser.add_argument("--without", default=",".join(PRESENT), help="packages that it has; default %(default)s")
    options = parser.parse_args()
    try:
        found = collect(options.folder, options.python, tuple(filter(None, options.without.split(","))))
    except NoWheels as error:
        parser.error(str(error))
    print(f"{len(found)} wheels, {sum(it.stat().st_size for it in found) / 2**20:.1f} MiB, in {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
