"""Files that are written completely or not at all, and that replace other files in one step."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fxquant.disk.exchange import force
from fxquant.disk.folders import writing
from fxquant.errors import WriteError


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield the path of a file to write; afterwards it becomes ``path`` and replaces what is there.

    If the block raises, the file that is there stays, and nothing else is left.

    Args:
        path: The final place; its folder is created.

    Raises:
        WriteError: If the file cannot be written, or a folder is in its place.
    """
    path = Path(path)
    with writing(path):
        if path.is_dir():
            raise WriteError(f"{path} is a folder; choose another name for the file")
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name[:200]}.saving-{secrets.token_hex(4)}")
        try:
            yield unfinished
            force(unfinished)
            os.replace(unfinished, path)
            force(path.parent)
        finally:
            unfinished.unlink(missing_ok=True)
