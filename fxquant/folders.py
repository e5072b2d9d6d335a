"""Folders that are written whole or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to write into; afterwards it takes the place of ``folder``, and of what was there.

    If the block raises, or the exchange fails, what was there stays, and nothing else is left.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        written, old = Path(scratch) / "new", Path(scratch) / "old"
        written.mkdir()
        yield written
        if folder.exists():
            folder.rename(old)
        try:
            written.rename(folder)
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise
