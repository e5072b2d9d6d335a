"""Inputs that are constants of a graph, neither tensors nor containers, and how a file stores them.

A constant can be compared with that of a later call, and a file can store it without any code. Constants are plain
values, torch's properties of tensors (dtype, layout, memory format, device), sizes, ranges, complex numbers, bytes and
UUIDs. numpy scalars count as the Python numbers that they hold.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

_PLAIN = (type(None), bool, int, float, str)
_Rule = tuple[type, Callable[[Any], Any], Callable[[Any], Any]]


def _of_torch(kind: type) -> _Rule:
    def read(name: str) -> Any:
        value = getattr(torch, name)
        if type(value) is not kind:
            raise ValueError(f"{name!r} is not a {kind.__name__}")
        return value

    return kind, lambda value: str(value).removeprefix("torch."), read


_WRITTEN: dict[str, _Rule] = {
    "dtype": _of_torch(torch.dtype),
    "layout": _of_torch(torch.layout),
    "memory_format": _of_torch(torch.memory_format),
    "device": (torch.device, str, torch.device),
    "size": (torch.Size, list, torch.Size),
    "range": (range, lambda value: [value.start, value.stop, value.step], lambda value: range(*value)),
    "complex": (complex, lambda value: [value.real, value.imag], lambda value: complex(*value)),
    "bytes": (bytes, bytes.hex, bytes.fromhex),
    "uuid": (uuid.UUID, str, uuid.UUID),
}
_KINDS = {kind: name for name, (kind, _, _) in _WRITTEN.items()}


def plain(value: Any) -> Any:
    """Convert a numpy scalar to the Python number, boolean or string that it holds; return other values unchanged."""
    if isinstance(value, np.generic):
        item = value.item()
        return item if type(item) in _PLAIN else value
    return value


def is_constant(value: Any) -> bool:
    """Whether a graph can be captured for this constant. Subclasses are refused: a file could not distinguish them."""
    return type(value) in _PLAIN or type(value) in _KINDS


def is_plain(value: Any) -> bool:
    """Whether ``torch.export`` takes this value as an input."""
    return type(value) in _PLAIN


def advice(value: Any) -> str:
    """What to do about a value that is not a constant."""
    if isinstance(value, np.ndarray):
        return "Give it as a tensor: torch.from_numpy(...)."
    if isinstance(value, _PLAIN):
        return f"Give it as a plain {next(kind.__name__ for kind in _PLAIN[1:] if isinstance(value, kind))}."
    if callable(value):
        return "Leave it out, or make it a part of the model, so that it is traced."
    return "Give what the model reads from it in one of these forms."


def to_json(value: Any) -> Any:
    """A constant as a JSON value; :func:`from_json` reads it back."""
    if type(value) in _PLAIN:
        return value
    name = _KINDS[type(value)]
    return {name: _WRITTEN[name][1](value)}


def from_json(data: Any) -> Any:
    """Undo :func:`to_json`.

    Raises:
        ValueError: If it is not a constant.
        KeyError: If its kind is unknown.
    """
    if not isinstance(data, dict):
        if type(data) not in _PLAIN:
            raise ValueError(f"{data!r} is not a constant")
        return data
    ((name, value),) = data.items()
    return _WRITTEN[name][2](value)
