"""Compiles the kernels on first use, keeps the library for the next, and loads it.

The compiler is the one that ``torch.compile`` uses on processors (``CXX``, or the first of those that inductor knows),
the sources are those in ``csrc``. What it makes lies in ``$FXQUANT_CACHE``, or ``fxquant`` in the user's cache folder,
under a name that changes with sources, flags, compiler, processor and the version of torch.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.utils.cpp_extension import include_paths, library_paths

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
_FLAGS = ("-std=c++20", "-O3", "-march=native", "-fPIC", "-fopenmp", "-w")
_LIBRARIES = ("-ltorch", "-ltorch_cpu", "-lc10")


class BuildError(RuntimeError):
    """The kernels cannot be compiled here; the message says why."""


def load() -> None:
    """Compile the kernels, unless they have been, and register them.

    Raises:
        BuildError: If there is no compiler, or it fails.
    """
    reason = _loaded()
    if reason is not None:
        raise BuildError(reason)


@functools.cache
def _loaded() -> str | None:
    """Why the library could not be loaded; None if it was."""
    try:
        torch.ops.load_library(str(_library()))
    except (BuildError, OSError) as error:
        return str(error)
    return None


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    named = os.environ.get("FXQUANT_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxquant"


def _library() -> Path:
    compiler = _compiler()
    path = cache_folder() / f"native-{_digest(compiler)}.so"
    if path.exists():
        return path
    began = time.perf_counter()
    logger.warning("fxquant compiles its kernels with %s, once", compiler)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = _compile(compiler, Path(folder))
            made.replace(path)  # At once, as other processes may be at the same.
    except OSError as error:
        raise BuildError(f"the kernels cannot be kept in {path.parent} ({error}); set FXQUANT_CACHE") from error
    logger.warning("compiled in %.0f s, kept in %s", time.perf_counter() - began, path)
    return path


def _compiler() -> str:
    try:
        return get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise BuildError("there is no C++ compiler; install g++ or clang++, or name one in CXX") from error


def _compile(compiler: str, folder: Path) -> Path:
    flags = [*_FLAGS, *(f"-I{path}" for path in include_paths())]
    sources = sorted(SOURCES.glob("*.cpp"))
    objects = [folder / f"{source.stem}.o" for source in sources]
    with ThreadPoolExecutor(min(len(sources), os.cpu_count() or 1)) as pool:
        list(
            pool.map(
                lambda pair: _run(compiler, *flags, "-c", pair[0], "-o", pair[1]), zip(sources, objects, strict=True)
            )
        )
    made = folder / "library.so"
    places = [flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    _run(compiler, "-shared", "-fopenmp", *objects, *places, *_LIBRARIES, "-o", made)
    return made


def _run(*command: str | Path) -> None:
    try:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[-300:])
        raise BuildError(f"{command[0]} fails at the kernels: {first}")


def _digest(compiler: str) -> str:
    digest = hashlib.sha256()
    for part in _identity(compiler):
        digest.update(part.encode())
    return digest.hexdigest()[:16]


def _identity(compiler: str) -> Iterator[str]:
    for path in sorted(SOURCES.iterdir()):
        yield path.name
        yield path.read_text(encoding="utf-8")
    yield " ".join(_FLAGS)
    yield compiler
    try:
        yield subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"{compiler} does not tell its version: {error}") from error
    yield torch.__version__
    yield platform.machine()
    # -march=native means another thing on another processor, and homes are shared between machines.
    yield str(sorted(torch.cpu.get_capabilities().items()))
