"""Decisions for which the plan has no field of its own, by pass and name, each of a type that the pass defines.

A pass of another package defines a type and asks the plan for its decisions::

    @dataclass
    class Rotation(Decision, of="rotate-inputs"):
        seed: int
        matrix: Tensor

    rotations = context.plan.decisions_of(Rotation)  # dict[str, Rotation], by any name, such as that of a layer
    if name not in rotations:
        rotations[name] = Rotation(seed=0, matrix=...)

The plan saves, loads, compares, copies and reports them. It does not need the pass for that.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, TypeVar, get_type_hints

import torch
from pydantic import PydanticSchemaGenerationError, PydanticUserError, TypeAdapter, ValidationError
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fxquant.errors import CheckpointError, ConfigurationError
from fxquant.schemas.common import Name

_TENSOR = "tensor"
_NAME = TypeAdapter[str](Name)


class Decision:
    """Base of the types of decisions. A subclass is a dataclass, and names its pass: ``class A(Decision, of="a")``.

    Fields may be tensors, and whatever pydantic writes as JSON and reads back unchanged: numbers, text, enums, None,
    lists, tuples, dicts and dataclasses of these. A field that holds a tensor or None has the type ``Tensor | None``.
    """

    of: ClassVar[str]
    """Name of the pass."""

    def __init_subclass__(cls, *, of: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if of is not None:
            cls.of = of
        elif not hasattr(cls, "of"):
            raise ConfigurationError(
                f"{cls.__name__} names no pass; write class {cls.__name__}(Decision, of='my-pass')"
            )
        if not re.fullmatch(r"[\w-]+", cls.of):
            raise ConfigurationError(f"{cls.__name__}: {cls.of!r} is not a name of a pass; write it as my-pass")


D = TypeVar("D", bound=Decision)


@dataclass
class Stored:
    """An entry as it was read from a file: JSON values and tensors, by field. A pass that asks for it gives it a type.

    Attributes:
        values: The fields that are not tensors.
        tensors: The fields that are tensors.
    """

    values: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


class PassDecisions:
    """The decisions of all passes that have no fields in the plan."""

    def __init__(self) -> None:
        self._passes: dict[str, dict[str, Any]] = {}

    def decisions_of(self, kind: type[D]) -> dict[str, D]:
        """The entries of one pass, by name; whoever changes the dict changes the plan.

        Raises:
            ConfigurationError: If the type is not a dataclass or has a field that cannot be stored, or if the pass has
                decisions of another type.
            CheckpointError: If an entry that was read from a file does not fit the type.
        """
        adapters = _adapters(kind)
        entries = self._passes.setdefault(kind.of, {})
        for name, entry in entries.items():
            if isinstance(entry, Stored):
                entries[name] = _read(kind, adapters, name, entry)
            elif type(entry) is kind:
                continue
            elif _path(type(entry)) == _path(kind):  # Defined again, as a cell of a notebook that runs twice does.
                entries[name] = _read(kind, adapters, name, _written(kind.of, name, entry))
            else:
                raise ConfigurationError(
                    f"the decisions of {kind.of} are {type(entry).__name__}s, not {kind.__name__}s; one pass has one "
                    "type of decision"
                )
        return entries

    def forget(self, of: str, name: str) -> bool:
        """Drop what a pass decided under a name, so that it decides again; returns whether there was something."""
        return self._passes.get(of, {}).pop(name, None) is not None

    def stored(self) -> Iterator[tuple[str, str, Stored]]:
        """Every entry with the name of its pass and its own name, as files hold it."""
        for of, entries in self._passes.items():
            for name, entry in entries.items():
                yield of, name, entry if isinstance(entry, Stored) else _written(of, name, entry)

    def __deepcopy__(self, memo: dict[int, Any]) -> PassDecisions:
        """A copy whose tensors have no history of gradients. Entries get their type again when a pass asks for them."""
        copied = PassDecisions()
        for of, name, entry in self.stored():
            tensors = {option: tensor.clone() for option, tensor in entry.tensors.items()}
            copied._passes.setdefault(of, {})[name] = Stored(copy.deepcopy(entry.values), tensors)
        return copied

    def to_json(self) -> dict[str, dict[str, dict[str, Any]]]:
        """The entries by pass and name; a tensor is written as ``{"tensor": key}``, with its key in :meth:`tensors`."""
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for of, name, entry in self.stored():
            keys = {option: {_TENSOR: _key(of, name, option)} for option in entry.tensors}
            found.setdefault(of, {})[name] = {**entry.values, **keys}
        return found

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of all entries."""
        return {
            _key(of, name, option): tensor
            for of, name, entry in self.stored()
            for option, tensor in entry.tensors.items()
        }

    @classmethod
    def from_json(
        cls, data: Mapping[str, Mapping[str, Mapping[str, Any]]], tensors: dict[str, Tensor]
    ) -> PassDecisions:
        """Read entries back.

        Args:
            data: What :meth:`to_json` returned.
            tensors: The tensors by key; those that entries hold are removed.

        Raises:
            CheckpointError: If a tensor is missing.
        """
        found = cls()
        for of, entries in data.items():
            for name, values in entries.items():
                entry = Stored()
                for option, value in values.items():
                    key = _key(of, name, option)
                    if value != {_TENSOR: key}:
                        entry.values[option] = value
                    elif key in tensors:
                        entry.tensors[option] = tensors.pop(key)
                    else:
                        raise CheckpointError(f"the decision {name!r} of {of} lacks its tensor {key!r}")
                found._passes.setdefault(of, {})[name] = entry
        return found


def _key(of: str, name: str, option: str) -> str:
    return f".{of}:{name}.{option}"


def is_of_pass(key: str) -> bool:
    """Whether a key is that of a tensor of a decision; the name of a layer does not start with a dot."""
    return key.startswith(".")


def _path(kind: type) -> tuple[str, str]:
    return kind.__module__, kind.__qualname__


def _adapters(kind: Any) -> dict[str, TypeAdapter[Any] | None]:
    """For each field what writes and reads it; None for a field that holds a tensor."""
    return _made_adapters(kind)


@functools.cache
def _made_adapters(kind: Any) -> dict[str, TypeAdapter[Any] | None]:
    if not isinstance(kind, type) or not issubclass(kind, Decision):
        raise ConfigurationError(f"{kind!r} is not a subclass of Decision")
    called = kind.__name__
    if not hasattr(kind, "__dataclass_fields__"):
        raise ConfigurationError(f"{called} is not a dataclass; decorate it with @dataclass")
    options = [*inspect.signature(kind).parameters]
    if set(options) != {option.name for option in fields(kind)}:  # type: ignore[arg-type]
        raise ConfigurationError(f"{called} should be made from its fields alone, without init=False and InitVar")
    try:
        hints = get_type_hints(kind)
    except NameError as error:
        raise ConfigurationError(
            f"the types of the fields of {called} cannot be found: {error}; define them at the top of a module"
        ) from error
    found: dict[str, TypeAdapter[Any] | None] = {}
    for option in options:
        hint = hints[option]
        try:
            found[option] = None if hint in (Tensor, Tensor | None) else TypeAdapter(hint)
        except (PydanticSchemaGenerationError, PydanticUserError) as error:
            raise ConfigurationError(
                f"the field {option!r} of {called} is a {hint}, which a plan cannot store: {str(error).splitlines()[0]}"
            ) from error
    return found


def _written(of: str, name: Any, entry: Any) -> Stored:
    """An entry as files hold it.

    Raises:
        ConfigurationError: If a field does not hold what its type says, or would be read back as something else.
    """
    if not isinstance(entry, Decision):
        raise ConfigurationError(f"the decision {name!r} of {of} is a {type(entry).__name__}, not a Decision")
    try:
        _NAME.validate_python(name, strict=True)
    except ValidationError as error:
        raise ConfigurationError(
            f"a decision of {of} is called {str(name)[:60]!r}; {error.errors()[0]['msg'].removeprefix('Value error, ')}"
        ) from error
    found = Stored()
    for option, adapter in _adapters(type(entry)).items():
        value = getattr(entry, option)
        if adapter is None:
            if value is None:
                found.values[option] = None
            else:
                found.tensors[option] = _storable(of, name, option, value)
            continue
        try:
            text = json.dumps(adapter.dump_python(value, mode="json", warnings="error"))
            back = adapter.validate_json(text, strict=True)
            found.values[option] = adapter.dump_python(back, mode="json")  # An int of a float field becomes a float.
        except ValidationError as error:
            raise _misfit(of, name, option, error.errors()[0]["msg"]) from error
        except (TypeError, ValueError, RecursionError) as error:  # Of serialization.
            raise _misfit(of, name, option, str(error).splitlines()[0]) from error
        if not _alike(value, back):
            raise _misfit(
                of, name, option, f"{value!r} would be read back as {back!r}; use a type that tells them apart"
            )
    return found


def _storable(of: str, name: str, option: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise _misfit(of, name, option, f"it is a {type(value).__name__}, not a tensor")
    plain = value.layout is torch.strided and value.device.type != "meta" and not isinstance(value, FakeTensor)
    if not plain or value.is_complex() or value.is_quantized:
        raise _misfit(of, name, option, "only dense tensors of real numbers with values can be stored")
    return value.detach()


def _alike(value: Any, back: Any) -> bool:
    """Whether a value was read back as it was, apart from ints that became floats. NaN is NaN."""
    if isinstance(value, float) and isinstance(back, float):
        return value == back or (value != value and back != back)
    if isinstance(value, (list, tuple)) and type(value) is type(back):
        return len(value) == len(back) and all(map(_alike, value, back))
    if isinstance(value, dict) and type(value) is type(back):
        keys = len(value) == len(back) and all(map(_alike, value, back))
        return keys and all(map(_alike, value.values(), back.values()))
    if is_dataclass(value) and not isinstance(value, type) and type(value) is type(back):
        return all(_alike(getattr(value, one.name), getattr(back, one.name)) for one in fields(value))
    number = type(value) is int and type(back) is float
    return bool((number or type(value) is type(back)) and value == back)


def _misfit(of: str, name: str, option: str, why: str) -> ConfigurationError:
    return ConfigurationError(f"the decision {name!r} of {of} cannot be stored: {option}: {why}")


def _read(kind: type[D], adapters: Mapping[str, TypeAdapter[Any] | None], name: str, entry: Stored) -> D:
    """Give an entry its type."""
    values: dict[str, Any] = {}
    for option, value in (*entry.values.items(), *entry.tensors.items()):
        if option not in adapters:
            raise CheckpointError(f"the decision {name!r} of {kind.of} has {option!r}, which {kind.__name__} does not")
        adapter = adapters[option]
        if (adapter is None) != (isinstance(value, Tensor) or value is None) and not (adapter and value is None):
            wanted = "a tensor" if adapter is None else "not a tensor"
            raise CheckpointError(f"the decision {name!r} of {kind.of}: {option} should be {wanted}")
        try:
            values[option] = value if adapter is None else adapter.validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            why = error.errors(include_url=False)[0]["msg"]
            raise CheckpointError(f"the decision {name!r} of {kind.of}: {option}: {why[:1].lower()}{why[1:]}") from None
    try:
        return kind(**values)
    except Exception as error:  # Whatever the type's own code raises.
        raise CheckpointError(f"the decision {name!r} of {kind.of} does not fit {kind.__name__}: {error}") from error


def same_tensors(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether two mappings hold the same tensors: names, dtypes, shapes and values, bit for bit."""
    return left.keys() == right.keys() and all(_same(tensor, right[name]) for name, tensor in left.items())


def _same(left: Tensor, right: Tensor) -> bool:
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    bytes_of = [one.detach().cpu().contiguous().flatten().view(torch.uint8) for one in (left, right)]
    return torch.equal(*bytes_of)
