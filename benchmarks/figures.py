"""Formats and writes figures, and finds the versions of the packages."""

from __future__ import annotations

import importlib.util
import math
import statistics
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The lower and the upper quartile; if there is one value, both are that value."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def decibel(value: float | None) -> str:
    """The value as a cell of a table; empty for None."""
    return "" if value is None else f"{value:.1f}"


def finite(value: float | None) -> float | str | None:
    """The value for JSON, which has neither infinity nor NaN: these become text."""
    return str(value) if value is not None and not math.isfinite(value) else value


def is_installed(module: str) -> bool:
    """Whether a module, such as ``optimum.quanto``, could be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # Of the package that holds it.
        return False


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of the packages that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write(path: Path, text: str) -> None:
    """Write a file atomically; create its folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
