"""Options in text, such as ``balance-channels{exponent=0.5 salience=max}`` or ``native{kernels=onednn}``.

An option is a bool, a number, a text, a path, a member of an enum, one of the values of a ``Literal``, a tuple of
these, or one of them or None. What is printed parses back to an equal value; types for which this cannot hold are
refused when a pass is registered (:func:`option_types`).
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import json
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from fxquant.errors import ConfigurationError, shortened
from fxquant.pipeline.syntax import Item, Reader, Value, is_plain, quoted

_SCALARS = (bool, int, float, str)


def read_named(text: str, kind: str, types_of: Callable[[str], Mapping[str, Any]]) -> tuple[str, dict[str, Any]]:
    """Read a name and its options.

    Args:
        text: The name, optionally followed by ``{option=value option=value}``.
        kind: The kind of the named object, for messages: ``pass`` or ``backend``.
        types_of: Names and types of the options of a name.

    Raises:
        ConfigurationError: If the text or an option cannot be read; the message points at the character.
    """
    reader = Reader(text, kind)
    item = reader.single()
    return item.name, read_options(item, reader, types_of)


def read_options(item: Item, reader: Reader, types_of: Callable[[str], Mapping[str, Any]]) -> dict[str, Any]:
    """The options of an item as values of their types; arguments and errors as for :func:`read_named`."""
    name, kind = item.name, reader.kind
    wanted = types_of(name)
    values: dict[str, Any] = {}
    for option in item.options:
        key = option.key.replace("-", "_")
        if key in wanted and option.value is None:
            message = f"{kind} {name!r}: the option {option.key!r} has no value; write {option.key}=value"
            raise reader.error(option.at, "this one", message)
        if key not in wanted or option.value is None:
            given = option.key if option.value is None else f"{option.key}={option.value.text}"
            raise reader.error(option.at, "this one", no_option(kind, name, given, wanted))
        if key in values:
            raise reader.error(option.at, "here again", f"{kind} {name!r} is given {option.key!r} twice")
        try:
            values[key] = read_value(option.value, wanted[key])
        except ConfigurationError as error:
            raise reader.error(
                option.value.at, "this value", f"{name}: {key}={shortened(option.value.text)!r} {error}"
            ) from None
    return values


def no_option(kind: str, name: str, given: str, known: Iterable[str]) -> str:
    """The message that an object, such as a pass, has no such option; it lists the options that it has."""
    shown = ", ".join(sorted(option.replace("_", "-") for option in known)) or "none"
    return f"{kind} {name!r} has no option {shortened(given)!r}. Its options: {shown}."


def read_value(value: Value, hint: Any) -> Any:
    """Read one value by its type.

    Raises:
        ConfigurationError: If the text is not a value of the type; the message begins with "cannot be read as".
    """
    base, optional = _without_none(hint)
    text = value.text
    if optional and text == "None" and not value.quoted:
        return None
    try:
        if _is_tuple(base):
            return _adapter(hint).validate_json(text, strict=True)
        return _adapter(hint).validate_python(_bare(text, base), strict=True)
    except ValidationError as error:
        why = error.errors(include_url=False)[0]
        where = "".join(f"[{number}]" for number in why["loc"] if isinstance(number, int)) if _is_tuple(base) else ""
        raise ConfigurationError(
            f"cannot be read as {shown_type(hint)}: {where} {why['msg']}".replace(":  ", ": ")
        ) from None
    except (ValueError, KeyError):
        choices = _choices(base)
        listed = f" ({', '.join(choices)})" if choices else ""
        raise ConfigurationError(f"cannot be read as {shown_type(hint)}{listed}") from None


def convert(value: Any, hint: Any) -> Any:
    """A value of the type from such a value or, unless the type is text, from its text.

    Raises:
        ConfigurationError: If the value is not of the type; the message begins with "cannot be read as".
    """
    base, _ = _without_none(hint)
    if isinstance(value, str) and not isinstance(value, enum.Enum) and base is not str:
        return read_value(Value(value, 0), hint)
    try:
        return _adapter(hint).validate_python(value, strict=True)
    except ValidationError:
        raise ConfigurationError(f"cannot be read as {shown_type(hint)}") from None


def print_value(value: Any, hint: Any) -> str:
    """The text of a value, from which :func:`read_value` reads it back.

    Raises:
        ConfigurationError: If the value is not of the type, or would be read back as another one.
    """
    base, _ = _without_none(hint)
    if isinstance(value, str) and not _is_text(value):
        raise ConfigurationError(f"{value!r} holds half of a character (a surrogate), which no file can store")
    if base is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if value is not None and _is_tuple(base):
        try:
            texts = [
                json.dumps(_adapter(hint).dump_python(value, mode="json", warnings="error"), separators=(",", ":"))
            ]
        except (ValueError, TypeError):  # It is not a tuple, or has items of other types.
            texts = []
    else:
        try:
            plain = str(value.value if isinstance(value, enum.Enum) else value)
        except ValueError as error:  # An integer of very many digits.
            raise ConfigurationError(f"the value cannot be written: {error}") from error
        texts = [plain] if is_plain(plain) else []
        if isinstance(value, (str, PurePath, enum.Enum)):
            texts.append(quoted(plain))
    for text in texts:
        given = Reader(f"_{{_={text}}}", "option").single().options[0].value
        assert given is not None
        try:
            back = read_value(given, hint)
        except ConfigurationError:
            continue
        if alike(value, back):
            return text
    raise ConfigurationError(f"{value!r} is not a value of type {shown_type(hint)} that can be written and read back")


def alike(value: Any, back: Any) -> bool:
    """Whether two values of an option are the same to a pass: equal, of equal types, and with the same sign of zero.

    An int in a tuple may have become a float.
    """
    if isinstance(value, tuple) and isinstance(back, tuple):
        return len(value) == len(back) and all(
            alike(float(one) if type(one) is int and isinstance(other, float) else one, other)
            for one, other in zip(value, back, strict=True)
        )
    if type(value) is not type(back) or value != back:
        return False
    return not isinstance(value, float) or math.copysign(1, value) == math.copysign(1, back)


@functools.cache
def option_types(cls: type) -> dict[str, Any]:
    """The types of the options of a dataclass, by name.

    Raises:
        ConfigurationError: If the class is not a dataclass, or an option cannot be printed and parsed.
    """
    called = getattr(cls, "name", cls.__name__)
    own = {name for name, hint in inspect.get_annotations(cls).items() if "ClassVar" not in str(hint)}
    if not dataclasses.is_dataclass(cls) or own - {option.name for option in dataclasses.fields(cls)}:
        raise ConfigurationError(
            f"{called}: {cls.__name__} is not a dataclass; decorate it with @dataclass(frozen=True)"
        )
    try:
        hints = typing.get_type_hints(cls, include_extras=True)
    except NameError as error:
        raise ConfigurationError(
            f"{called}: the types of the options of {cls.__name__} cannot be found: {error}; define them at the top of "
            "a module"
        ) from error
    found: dict[str, Any] = {}
    for option in dataclasses.fields(cls):
        hint = hints[option.name]
        if not option.init or not option.compare:
            raise ConfigurationError(
                f"{called}: the option {option.name!r} has init=False or compare=False, so the text of the pass could "
                "not stand for it; make it an ordinary field, or compute it in run()"
            )
        if not _is_supported(_without_none(hint)[0]):
            raise ConfigurationError(
                f"{called}: the option {option.name!r} is a {shown_type(hint)}, which cannot be printed and parsed; "
                "use bool, int, float, str, Path, an enum, Literal, tuple[...] of these, or one of them | None"
            )
        found[option.name] = hint
    return found


def shown_type(hint: Any) -> str:
    """A type as people write it."""
    if get_origin(hint) is Annotated:
        return shown_type(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return " | ".join("None" if part is type(None) else shown_type(part) for part in get_args(hint))
    if isinstance(hint, type) and get_origin(hint) is None:
        return hint.__name__
    return str(hint).replace("typing.", "")


def _without_none(hint: Any) -> tuple[Any, bool]:
    """A type without constraints and without None, and whether it allows None."""
    if get_origin(hint) is Annotated:
        return _without_none(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        parts = [part for part in get_args(hint) if part is not type(None)]
        if len(parts) == 1:
            return _without_none(parts[0])[0], True
    return hint, False


def _is_supported(base: Any) -> bool:
    if base in _SCALARS or base in (Path, PurePath):
        return True
    if isinstance(base, type) and issubclass(base, enum.Enum):
        return len({str(member.value) for member in base}) == len(base) > 0
    if get_origin(base) is Literal:
        choices = get_args(base)
        return all(isinstance(one, (bool, int, str)) for one in choices) and len(set(map(str, choices))) == len(choices)
    if _is_tuple(base):
        parts = [part for part in get_args(base) if part is not Ellipsis]
        return bool(parts) and all(_is_supported(_without_none(part)[0]) for part in parts)
    return False


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_tuple(base: Any) -> bool:
    return get_origin(base) is tuple


def _bare(text: str, base: Any) -> Any:
    """The value of a text without quotes.

    Raises:
        ValueError: If the text is not of the type.
        KeyError: The same.
    """
    if base is bool:
        return {"True": True, "False": False}[text]
    if isinstance(base, type) and issubclass(base, enum.Enum):
        return {str(member.value): member for member in base}[text]
    if get_origin(base) is Literal:
        return {str(choice): choice for choice in get_args(base)}[text]
    if base in (int, float) or (isinstance(base, type) and issubclass(base, PurePath)):
        return base(text)
    return text


def _choices(base: Any) -> list[str]:
    if isinstance(base, enum.EnumMeta):
        members: list[enum.Enum] = list(base)
        return [str(member.value) for member in members]
    return [str(choice) for choice in get_args(base)] if get_origin(base) is Literal else []


@functools.cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint)
