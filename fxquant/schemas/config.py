"""Schema of ``config.json``: the values that a model's class is built with. The class decides on the entries."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import ConfigDict, RootModel, model_validator

_DEEPEST = 32
_LARGEST = 1 << 40


class Config(RootModel[dict[str, Any]]):
    """A JSON object of numbers, texts and booleans, in lists and objects."""

    model_config = ConfigDict(strict=True)

    @model_validator(mode="after")
    def _plain(self) -> Config:
        for value in _leaves(self.root, 0):
            if isinstance(value, int) and abs(value) > _LARGEST:
                raise ValueError("it has a number that is larger than any size can be")
        return self


def _leaves(value: Any, depth: int) -> Iterator[Any]:
    if depth > _DEEPEST:
        raise ValueError(f"it is more than {_DEEPEST} levels deep")
    if isinstance(value, (dict, list)):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _leaves(entry, depth + 1)
    else:
        yield value
