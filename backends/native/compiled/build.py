"""Compiles the kernels on first use, keeps the library for later use, and loads it.

The compiler is the one that ``torch.compile`` uses on CPUs (``CXX``, or the first of those that inductor knows). The
sources are in ``csrc``. The library is kept in a folder that only the user can open, in ``$FXQUANT_CACHE`` or in
``fxquant`` in the user's cache folder. The library's name changes with sources, flags, compiler, processor and the
version of torch, and ends in the digest of its content. A damaged library is compiled again. A library that another
user could have written is not loaded.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import platform
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.utils.cpp_extension import include_paths, library_paths

from fxquant.disk.files import digest

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fopenmp", "-w")
_LIBRARIES = ("-ltorch", "-ltorch_cpu", "-lc10")


class BuildError(RuntimeError):
    """The kernels cannot be compiled here; the message says why."""


def load(flags: tuple[str, ...]) -> None:
    """Compile the kernels, unless they are compiled already, and register them.

    Args:
        flags: Flags of the compiler that say which instructions it may use. A process uses the same ones always.

    Raises:
        BuildError: If there is no compiler, or the compiler fails.
    """
    reason = _loaded(flags)
    if reason is not None:
        raise BuildError(reason)


@functools.cache
def _loaded(flags: tuple[str, ...]) -> str | None:
    """Why the library could not be loaded; None if it was."""
    try:
        torch.ops.load_library(str(_library(flags)))
    except (BuildError, OSError) as error:
        return str(error)
    return None


def cache_folder() -> Path:
    """Where compiled kernels are kept.

    Raises:
        BuildError: If the user has no home, as in some containers, and no environment variable names a folder.
    """
    named, cache = os.environ.get("FXQUANT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if named:
        return Path(named)
    try:
        return (Path(cache) if cache else Path.home() / ".cache") / "fxquant"
    except RuntimeError as error:
        raise BuildError("there is no home folder to keep the kernels in; set FXQUANT_CACHE to a folder") from error


def kernel_folder() -> Path:
    """The folder of compiled libraries, made if needed. It belongs to the user and is closed to all other users.

    Raises:
        BuildError: If the folder cannot be made, belongs to another user, or can be written to by others.
    """
    owner = os.getuid() if hasattr(os, "getuid") else None
    path = cache_folder() / ("native" if owner is None else f"native-{owner}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        found = path.lstat()
    except OSError as error:
        raise BuildError(f"the kernels cannot be kept in {path.parent} ({error}); set FXQUANT_CACHE") from error
    if not stat.S_ISDIR(found.st_mode):
        raise BuildError(f"{path} is not a folder; remove it, or set FXQUANT_CACHE to a folder of your own")
    if owner is not None and (found.st_uid != owner or found.st_mode & 0o022):
        whose = "belongs to another user" if found.st_uid != owner else "can be written to by others"
        raise BuildError(
            f"{path} {whose}, who could have put any program into it; remove it, or set FXQUANT_CACHE to a folder of "
            "your own"
        )
    return path


def _library(flags: tuple[str, ...]) -> Path:
    compiler = _compiler()
    folder, name = kernel_folder(), f"native-{_digest(compiler, flags)}"
    kept = _kept(folder, name)
    if kept is not None:
        return kept
    began = time.perf_counter()
    logger.warning("fxquant compiles its kernels with %s; this happens once", compiler)
    try:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = _compile(compiler, flags, Path(scratch))
            path = folder / f"{name}-{digest(made)}.so"
            made.replace(path)  # Atomic, because other processes may do the same.
    except OSError as error:
        raise BuildError(f"the kernels cannot be kept in {folder} ({error}); set FXQUANT_CACHE") from error
    logger.warning("compiled in %.0f s, kept in %s", time.perf_counter() - began, path)
    return path


def _kept(folder: Path, name: str) -> Path | None:
    """The library of this name that was compiled before, or None. Damaged libraries are removed."""
    for path in sorted(folder.glob(f"{name}-*.so")):
        try:
            if path.is_file() and not path.is_symlink() and path.stem == f"{name}-{digest(path)}":
                return path
            logger.warning("%s is damaged and will be compiled again", path)
            path.unlink(missing_ok=True)
        except FileNotFoundError:  # Another process has removed it.
            continue
        except OSError as error:
            raise BuildError(f"{path} cannot be read ({error}); remove it, or set FXQUANT_CACHE") from error
    return None


def _compiler() -> str:
    try:
        return get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise BuildError("there is no C++ compiler; install g++ or clang++, or name one in CXX") from error


def _compile(compiler: str, instructions: tuple[str, ...], folder: Path) -> Path:
    flags = [*_FLAGS, *instructions, *(f"-I{path}" for path in (SOURCES, *include_paths()))]
    batches = _batches(sorted(SOURCES.glob("*.cpp")), _cores())
    units = [folder / f"{number}.cpp" for number in range(len(batches))]
    for unit, batch in zip(units, batches, strict=True):
        unit.write_text("".join(f'#include "{source.name}"\n' for source in batch), encoding="utf-8")
    objects = [unit.with_suffix(".o") for unit in units]
    with ThreadPoolExecutor(len(units)) as pool:
        list(pool.map(lambda unit, made: _run(compiler, *flags, "-c", unit, "-o", made), units, objects))
    made = folder / "library.so"
    places = [flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    _run(compiler, "-shared", "-fopenmp", *objects, *places, *_LIBRARIES, "-o", made)
    return made


def _batches(sources: Sequence[Path], most: int) -> list[list[Path]]:
    """Divide sources into so many batches of about the same size, which are compiled at the same time.

    The headers of torch take half of the time of a source, and each batch reads them once.
    """
    batches: list[list[Path]] = [[] for _ in range(min(most, len(sources)))]
    sizes = {source: source.stat().st_size for source in sources}
    for source in sorted(sources, key=lambda source: (-sizes[source], source.name)):
        min(batches, key=lambda batch: sum(sizes[other] for other in batch)).append(source)
    return batches


def _cores() -> int:
    """The cores that this process may use, which in a container can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run(*command: str | Path) -> None:
    try:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[-300:])
        raise BuildError(f"{command[0]} fails to compile the kernels: {first}")


def _digest(compiler: str, flags: tuple[str, ...]) -> str:
    found = hashlib.sha256()
    for part in _identity(compiler, flags):
        found.update(part.encode())
    return found.hexdigest()[:16]


def _identity(compiler: str, flags: tuple[str, ...]) -> Iterator[str]:
    for path in sorted(SOURCES.iterdir()):
        yield path.name
        yield path.read_text(encoding="utf-8")
    yield " ".join((*_FLAGS, *flags))
    yield compiler
    try:
        yield subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"{compiler} does not report its version: {error}") from error
    yield torch.__version__
    yield platform.machine()
    # The code for -march=native and -mtune=native depends on the processor, and machines may share the home folder.
    yield str(sorted(torch.cpu.get_capabilities().items()))
