"""Names with options in text, such as ``balance-channels{exponent=0.5 salience=max}`` or ``native{products=fp8}``."""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Mapping
from typing import Any

from fxquant.errors import ConfigurationError

_TEXT = re.compile(r"([\w.-]+)(?:\{([^}]*)\})?")


def read_named(text: str, kind: str, types_of: Callable[[str], Mapping[str, Any]]) -> tuple[str, dict[str, Any]]:
    """Read a name and its options.

    Args:
        text: The name, optionally followed by ``{option=value option=value}``.
        kind: The kind of the named object, for messages: ``pass`` or ``backend``.
        types_of: Names and types of the options of a name.

    Raises:
        ConfigurationError: If the text or an option cannot be read.
    """
    match = _TEXT.fullmatch(text.strip())
    if match is None:
        raise ConfigurationError(f"{text!r} is not a {kind}; write name or name{{option=value option=value}}")
    name, options = match.groups()
    types = types_of(name)
    values: dict[str, Any] = {}
    for entry in (options or "").split():
        key, equals, value = entry.partition("=")
        key = key.replace("-", "_")
        if key not in types or not equals:
            shown = ", ".join(sorted(k.replace("_", "-") for k in types)) or "none"
            raise ConfigurationError(f"{kind} {name!r} has no option {entry!r}. Its options: {shown}.")
        values[key] = _read(value, types[key], f"{name}: {key}")
    return name, values


def _read(text: str, wanted: Any, what: str) -> Any:
    try:
        if wanted is bool:
            return {"True": True, "False": False}[text]
        if isinstance(wanted, type) and issubclass(wanted, enum.Enum):
            return wanted(text)
        if wanted in (int, float):
            return wanted(text)
    except (ValueError, KeyError):
        members: list[enum.Enum] = list(wanted) if isinstance(wanted, enum.EnumMeta) else []
        choices = f" ({', '.join(str(member.value) for member in members)})" if members else ""
        raise ConfigurationError(f"{what}={text!r} cannot be read as {wanted.__name__}{choices}") from None
    return text
