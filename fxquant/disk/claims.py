"""Claims on output folders: of two commands that work for one folder, the second is refused before it does any work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fxquant.disk.finished_work import locked
from fxquant.disk.folders import beside_always, tidy
from fxquant.disk.locks import Lock
from fxquant.disk.refusals import writing
from fxquant.errors import FolderInUseError


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep other processes that claim the same folder away meanwhile.

    The claim is the lock of an empty hidden folder next to it. It ends with the process, however it ends; a folder that
    a killed process left is claimed by the next one, and removed at its end.

    Args:
        folder: The output folder, which need not exist, as a resolved path.

    Raises:
        FolderInUseError: If another process has claimed it.
        WriteError: If the folder next to it cannot be made.
    """
    place = folder.parent / beside_always(folder, "claimed")
    with writing(folder):
        made = [parent for parent in folder.parents if not parent.exists()]
        folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = _lock(place, folder)
        try:
            yield
        finally:
            with suppress(OSError):
                place.rmdir()
            del lock
    finally:
        with suppress(OSError):  # They are not empty.
            for parent in made:
                parent.rmdir()


def _lock(place: Path, folder: Path) -> Lock:
    try:
        return locked(place)
    except FolderInUseError:
        raise FolderInUseError(
            f"another process is making {folder}; wait until it ends, or choose another folder"
        ) from None


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed process left of a save to a folder, unless another process works on it."""
    with suppress(FolderInUseError), claimed(folder):
        tidy(folder)
