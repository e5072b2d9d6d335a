"""Attributes of a module that are replaced for some time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def instance_attribute(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Within this context, set an instance attribute of a module, in place of its own or over that of its class."""
    missing = object()
    own = module.__dict__.get(name, missing)
    module.__dict__[name] = value
    try:
        yield
    finally:
        if own is missing:
            del module.__dict__[name]
        else:
            module.__dict__[name] = own
