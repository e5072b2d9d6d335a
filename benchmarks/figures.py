"""How figures are written, and what they were measured with."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The lower and the upper one; both the value itself where there is one."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def decibel(value: float | None) -> str:
    """For a cell of a table, empty where there is none."""
    return "" if value is None else f"{value:.1f}"


def finite(value: float | None) -> float | str | None:
    """For JSON, which knows neither infinity nor NaN."""
    return str(value) if value is not None and not math.isfinite(value) else value


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Those that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write(path: Path, text: str) -> None:
    """Write a file, whole or not at all, in a folder that need not be there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
