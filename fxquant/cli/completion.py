"""Names that the shell completes for options. They are entry points, so neither torch nor a plugin is imported."""

from __future__ import annotations

from importlib.metadata import entry_points

_PRECISIONS = ("w8a8", "w4a8", "w8a16", "w4a16")


def recipes(incomplete: str) -> list[str]:
    """Recipes with usual precisions."""
    return [name for name in _with_precision(_names("recipes")) if name.startswith(incomplete)]


def backends(incomplete: str) -> list[str]:
    """Backends."""
    return [name for name in _names("backends") if name.startswith(incomplete)]


def passes(incomplete: str) -> list[str]:
    """A list of passes joined by commas, with the last one completed."""
    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in _names("passes") if name.startswith(last)]


def _names(kind: str) -> list[str]:
    return sorted({entry.name for entry in entry_points(group=f"fxquant.{kind}")})


def _with_precision(names: list[str]) -> list[str]:
    return [f"{name}-{precision}" for name in names for precision in _PRECISIONS]
