"""Reads JSON files of what was measured, each with the number of its format."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fxquant.disk.files import blaming
from fxquant.errors import CheckpointError
from fxquant.schemas.common import Schema, check, read_json


@contextmanager
def reading(path: Path, schema: type[Schema], *, format: int, what: str, made_by: str) -> Iterator[Mapping[str, Any]]:
    """The values of a file. Errors within the context name the file.

    Args:
        path: The file.
        schema: What its values should fit.
        format: The highest number of the format that is read.
        what: What the file is, such as ``file of sensitivities``.
        made_by: The command that writes such a file, and its option.

    Raises:
        CheckpointError: If there is no such file, it is damaged, or a newer fxquant wrote it.
    """
    if not path.is_file():
        state = "is not a file" if os.path.lexists(path) else "does not exist"
        raise CheckpointError(f"{path} {state}; {made_by}")
    _, data = read_json(path, what)
    with blaming(path):
        number = data.get("format") if isinstance(data, Mapping) else None
        if isinstance(number, int) and number > format:
            raise CheckpointError(f"it has format {number}, this fxquant reads {format}; install a newer fxquant")
        check(schema, data, "the file")
        yield data
