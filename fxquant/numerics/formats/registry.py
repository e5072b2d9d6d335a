"""All number formats by name, those of fxquant and those of other packages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fxquant.errors import ConfigurationError
from fxquant.numerics.formats.conduct import check_attributes, try_out
from fxquant.numerics.formats.format import Format
from fxquant.numerics.formats.integers import Integer
from fxquant.numerics.packing import MAX_BITS, MIN_BITS
from fxquant.registry import OWN, Registry


def _check(name: str, item: Any) -> None:
    if not isinstance(item, Format):
        raise ConfigurationError(f"the format {name!r} is {item!r}, not an instance of fxquant.authoring.Format")
    if item.name != name:
        raise ConfigurationError(f"the format {name!r} calls itself {item.name!r}; both names have to agree")
    check_attributes(name, item)
    if not type(item).__module__.startswith(OWN):
        try_out(item)


FORMATS: Registry[Format] = Registry("format", "fxquant.formats", _check)
"""All known number formats by name. An entry point names an instance of :class:`Format`."""


def register_format(name: str) -> Callable[[Format], Format]:
    """``register_format("name")(format)`` adds a format from a script or notebook, and returns it.

    Raises:
        ConfigurationError: If it is not a format, or its attributes do not fit together.
        DuplicateNameError: If the name is taken, by code or by an installed package.
    """

    def register(item: Format) -> Format:
        _check(name, item)
        known = FORMATS.loaded(name)
        if known is not None and _is_again(known, item):
            FORMATS.remove(name)
        return FORMATS.register(name)(item)

    return register


INTEGERS = frozenset(f"int{bits}" for bits in range(MIN_BITS, MAX_BITS + 1))
"""Names of the integer formats."""


def _is_again(known: Format, item: Format) -> bool:
    """Whether a format is that of a cell of a notebook that runs twice: of the same class, with the same numbers."""
    classes = [(type(each).__module__, type(each).__qualname__) for each in (known, item)]
    old, new = vars(known), vars(item)
    plain = (bool, int, float, str, type(None))
    return (
        classes[0] == classes[1]
        and old.keys() == new.keys()
        and all(old[key] is new[key] or (isinstance(old[key], plain) and old[key] == new[key]) for key in old)
    )


def format_of(bits: int | None, name: str | None) -> Format | None:
    """The format of codes in a plan: of integers if there is no name; None if there are no codes.

    Raises:
        UnknownNameError: If there is no format of the name.
    """
    if bits is None:
        return None
    return FORMATS[f"int{bits}" if name is None else name]


def is_integer(name: str) -> bool:
    """Whether a format is one of fxquant's integers, whose products backends compute exactly."""
    return name in INTEGERS


def bits_of(name: str) -> int:
    """Bits per code of a format.

    Raises:
        UnknownNameError: If there is no format of the name.
    """
    return int(FORMATS[name].bits)


def top_of(name: str) -> int:
    """The highest code of an integer format.

    Raises:
        ConfigurationError: If the format is not an integer format.
    """
    found = FORMATS[name]
    if not isinstance(found, Integer):
        raise ConfigurationError(f"{name} is not an integer format; choose one of {', '.join(sorted(INTEGERS))}")
    return found.top
