"""Refuses arguments of an evaluation that have a wrong type, before anything is read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

from fxquant.errors import ConfigurationError, check_type
from fxquant.evaluation.reference import Reference

_PLACES = ("against", "inception", "lpips", "clip", "work", "float_work", "picture")


def check_arguments(given: Mapping[str, Any]) -> None:
    """Check the types of the arguments of :func:`fxquant.evaluate`, by name.

    Raises:
        ConfigurationError: Names the argument and says what is taken.
    """
    for name in ("images", "batch", "steps", "seed", "sfid_images"):
        check_type(name, given[name], Integral, "a whole number")
    if given["images"] < 1 or given["sfid_images"] < 1:
        raise ConfigurationError("images and sfid_images should be at least 1")
    for name in _PLACES:
        if given[name] is not None and not (name == "against" and isinstance(given[name], Reference)):
            check_type(name, given[name], (str, Path), "a path" + (", or a Reference" if name == "against" else ""))
    _check_texts("prompts", given["prompts"])
    _check_texts("metrics", given["metrics"])
    for name in ("limits", "sizes"):
        if given[name] is not None:
            check_type(name, given[name], Mapping, "a dict")
    labels, shard = given["labels"], given["shard"]
    if not isinstance(labels, str):
        check_type("labels", labels, Collection, "'balanced', 'uniform' or a list of classes")
        for label in labels:
            check_type("each of labels", label, Integral, "a whole number")
    if shard is not None:
        check_type("shard", shard, (tuple, list), "a pair such as (0, 4)")
        if len(shard) != 2:
            raise ConfigurationError(f"shard {shard} should be a pair such as (0, 4)")
        for number in shard:
            check_type("each of shard", number, Integral, "a whole number")


def _check_texts(name: str, given: object) -> None:
    """Refuse one text where several are taken: its letters would be taken one by one."""
    if isinstance(given, str):
        raise ConfigurationError(f"{name} is one text; give a list, such as [{given!r}]")
    if given is not None:
        check_type(name, given, Collection, "a list of texts")
        for text in given:  # type: ignore[attr-defined]
            check_type(f"each of {name}", text, str, "a text")
