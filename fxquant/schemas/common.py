"""Types that the schemas share, and functions that compare a file with its schema."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from fxquant.errors import CheckpointError

LARGEST_FILE = 12 << 20
"""The most bytes of JSON that are read, in some seconds and 150 MB of memory. A plan has about 1,000 per layer."""

_SHOWN = 60  # Characters of a value that an error shows.

S = TypeVar("S", bound=BaseModel)


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("a name holds characters that cannot be printed")
    return text


def _dtype(name: str) -> str:
    if not isinstance(getattr(torch, name, None), torch.dtype):
        raise ValueError("torch has no dtype of this name")
    return name


def _float_dtype(name: str) -> str:
    if not getattr(torch, _dtype(name)).is_floating_point:
        raise ValueError("this is not a floating-point dtype")
    return name


def _ascending(values: list[float]) -> list[float]:
    if any(left > right for left, right in itertools.pairwise(values)):
        raise ValueError("the numbers should be in ascending order")
    return values


Name = Annotated[str, Field(min_length=1, max_length=500), AfterValidator(_printable)]
Text = Annotated[str, Field(max_length=20_000)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Ascending = Annotated[list[Finite], Field(fail_fast=True, max_length=10_000), AfterValidator(_ascending)]
Bits = Annotated[int, Field(ge=2, le=8)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Size = Annotated[int, Field(ge=0, lt=2**31)]
DtypeName = Annotated[str, AfterValidator(_dtype)]
FloatDtypeName = Annotated[str, AfterValidator(_float_dtype)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Schema(BaseModel):
    """Base of all schemas: types are compared strictly, so that ``"4"`` and ``true`` are not numbers.

    Entries that a schema does not name are not checked; the code that reads them has to check them.
    """

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class Entry(Schema):
    """Base of schemas for values that become one object: entries that the object does not have are refused by name."""

    model_config = ConfigDict(extra="forbid")


def check(schema: type[S], data: Any, what: str) -> S:
    """Compare JSON values with a schema.

    Args:
        schema: The schema that the values should fit.
        data: The values.
        what: What the values are, for the message, such as ``the plan``.

    Raises:
        CheckpointError: Names the first entry that does not fit, and says why.
    """
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = _place(first["loc"], data)
        reason = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            raise CheckpointError(f"{what} is not valid{place}: there is no such entry; check its spelling") from None
        missing = first["type"] == "missing"
        found = "" if missing or place == "" else f", not {_shown(first['input'])}"
        raise CheckpointError(f"{what} is not valid{place}: {reason[:1].lower()}{reason[1:]}{found}") from None


def read_json(path: Path, what: str) -> tuple[str, Any]:
    """Text and values of a JSON file.

    Args:
        path: The file.
        what: What to copy again if the file is damaged: ``checkpoint`` or ``package``.

    Raises:
        CheckpointError: If the file cannot be read, or is larger than any file that fxquant writes.
    """
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise CheckpointError(f"{path} has {size} bytes; at most {LARGEST_FILE} are read. Copy the {what} again")
        text = path.read_text(encoding="utf-8")
        return text, json.loads(text)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); copy the {what} again") from error


def _place(location: tuple[int | str, ...], data: Any) -> str:
    """Where in the data an error is; pydantic also names the branch of a union, which is not a place in the data."""
    found: list[str] = []
    for part in location:
        inside = isinstance(data, Mapping) and part in data
        listed = isinstance(data, list) and isinstance(part, int) and part < len(data)
        if inside or listed:
            data = data[part]
        elif not (isinstance(data, Mapping) and part == location[-1]):
            continue
        found.append(_shown(part))
    return f" at {' > '.join(found)}" if found else ""


def _shown(value: Any) -> str:
    """A value on one line, shortened if it is long."""
    if isinstance(value, (Mapping, list)):
        return f"a {'list' if isinstance(value, list) else 'dict'} of {len(value)}"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = ascii(value[:_SHOWN] if isinstance(value, str) else value)
    return text if len(text) <= _SHOWN + 2 else f"{text[:_SHOWN]}..."
