"""Schema of a recorded call of a model (:class:`fxquant.capture.calls.CallSpec`), as plans and packages hold it."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fxquant.schemas.common import DtypeName, Name, Schema, Size, Text

_DEEPEST = 32


class Leaf(Schema):
    """One input: a tensor's shape and dtype, or a constant."""

    shape: Annotated[list[Size | Literal["batch"]], Field(max_length=16)] | None = None
    dtype: DtypeName | None = None
    values: Annotated[list[int | float], Field(fail_fast=True)] | None = None
    number: bool = False

    @model_validator(mode="after")
    def _whole(self) -> Leaf:
        if (self.shape is None) != (self.dtype is None):
            raise ValueError("a tensor should have both a shape and a dtype")
        if self.values is not None:
            sizes = [1 if isinstance(size, str) else size for size in self.shape or ()]
            if self.shape is None or math.prod(sizes) != len(self.values):
                raise ValueError("there should be as many values as the shape has elements")
        return self


class Call(Schema):
    """One kind of call."""

    names: Annotated[list[Name], Field(max_length=2000)]
    leaves: Annotated[list[Leaf], Field(fail_fast=True, max_length=2000)]
    structure: Any
    fixed: Text | None = None

    @model_validator(mode="after")
    def _fits(self) -> Call:
        if len(self.names) != len(self.leaves):
            raise ValueError(f"there are {len(self.names)} names for {len(self.leaves)} inputs")
        if not isinstance(self.structure, dict) or not isinstance(self.structure.get("dict"), dict):
            raise ValueError("the structure of a call should be a dict of its inputs")
        numbers: list[int] = []
        _collect(self.structure, numbers, 0)
        if sorted(numbers) != list(range(len(self.leaves))):
            raise ValueError("the structure should hold the number of each input once")
        return self


def _collect(structure: Any, numbers: list[int], depth: int) -> None:
    """Add the leaf numbers in a structure to ``numbers``."""
    if depth > _DEEPEST:
        raise ValueError(f"the structure is more than {_DEEPEST} levels deep")
    if isinstance(structure, int) and not isinstance(structure, bool):
        numbers.append(structure)
    elif isinstance(structure, (dict, list)):
        for value in structure.values() if isinstance(structure, dict) else structure:
            _collect(value, numbers, depth + 1)
    else:
        raise ValueError("the structure should hold only numbers of inputs")
