"""Folders that are written completely or not at all, and that replace other folders in one step.

A folder is written next to its final place, as ``.NAME.saving-XXXXXXXX``, and forced to disk. Then one step of the file
system exchanges it with the folder that is there: ``renameat2`` of Linux with ``RENAME_EXCHANGE``. If there is no such
step, the folder that is there is first renamed to ``.NAME.replaced-XXXXXXXX``. So, whenever the process ends, there is
one complete folder, under its own name or under this second name. The next save of the same name puts a folder with the
second name back, and removes what interrupted saves left; loading mentions both.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fxquant.disk.exchange import exchange, force, force_to_disk
from fxquant.disk.locks import Lock
from fxquant.disk.refusals import writing
from fxquant.errors import CheckpointError, WriteError

_TRIES = 100  # Attempts at a step that another process can interfere with.
_LONGEST = 200  # Bytes of a name before the suffixes below are added; most file systems allow 255.
SAVING, _REPLACED, _TRIAL = "saving", "replaced", ".fxquant-trial-"

Check = Callable[[Path], None]


@contextmanager
def whole_folder(folder: Path, check: Check) -> Iterator[Path]:
    """Yield an empty folder to write into; afterwards it becomes ``folder`` and replaces what is there.

    If the block raises, what is there stays, and nothing else is left. If the block succeeds but the folder cannot go
    to its place, because something else has appeared there, it is kept next to it, under a name that the error gives.

    Args:
        folder: The final place, as a resolved path.
        check: Raises ``CheckpointError`` if what is at a path must not be replaced. It is called before writing, and
            again before anything is moved or removed.

    Raises:
        CheckpointError: What ``check`` raises before writing. Also if a file elsewhere cannot be read; it names this
            file.
        WriteError: If the folder cannot be written, or something that must stay has appeared in its place.
    """
    _ready(folder, check)
    with writing(folder), parents_of(folder):
        scratch = _Scratch(folder)
        try:
            with _blaming_sources(scratch.path):
                yield scratch.path
            force_to_disk(scratch.path)
            scratch.place(check)
        finally:
            scratch.clear(check)


def prepare(folder: Path, check: Check) -> None:
    """Check that a folder can be written, before anything that takes long.

    What a killed save left behind is put back or removed.

    Raises:
        CheckpointError: What ``check`` raises.
        WriteError: If the folder cannot be written.
    """
    _ready(folder, check)
    with writing(folder):
        if not folder.parent.exists():
            _try_to_make(folder)
            return
        scratch = _Scratch(folder)
        try:
            _try_to_write(scratch.path)
        finally:
            scratch.clear(check)


def _ready(folder: Path, check: Check) -> None:
    with writing(folder):
        tidy(folder)
        for _ in range(_TRIES):
            if _may_replace(folder, check):
                break
    if _current_folder().is_relative_to(folder):
        raise WriteError(
            f"{folder} is or contains the current folder, which would be gone after the folder is replaced; choose "
            "another folder, or run this from elsewhere"
        )
    if os.path.ismount(folder):
        raise WriteError(f"{folder} is where a disk is mounted, so it cannot be replaced; choose a folder in it")


def _current_folder() -> Path:
    with suppress(OSError):  # The current folder has been removed.
        return Path.cwd()
    return Path(os.devnull)


def check_writable(path: Path) -> None:
    """Try to make a folder, with its parents, and a file in it; nothing is left behind.

    Raises:
        WriteError: If that fails, because of a read-only folder, a full disk, a name that is too long, or a parent that
            is a file.
    """
    with writing(path):
        _try_to_make(path.resolve())  # A ".." in the path would lead out of the trial folder.


def _try_to_make(path: Path) -> None:
    there = path
    while not there.exists():
        there = there.parent
    for left in there.glob(f"{_TRIAL}*"):  # Of processes that were killed; those that run hold a lock.
        if Lock.of(left, certain=True) is not None:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=there, prefix=_TRIAL) as trial:
        lock = Lock.of(Path(trial))
        made = Path(trial, *path.relative_to(there).parts)
        made.mkdir(parents=True, exist_ok=True)
        _try_to_write(made)
        del lock


def _try_to_write(folder: Path) -> None:
    (folder / "trial").write_bytes(b"x" * 4096)


@contextmanager
def _blaming_sources(scratch: Path) -> Iterator[None]:
    """Turn errors of files that are read while a folder is written into errors that name these files."""
    try:
        yield
    except shutil.Error as error:  # From copytree, which lists what it could not copy.
        listed = error.args[0] if isinstance(error.args[0], list) else None
        if not listed:
            raise
        raise CheckpointError(f"{listed[0][0]} cannot be copied: {listed[0][2]}") from error
    except OSError as error:
        name = error.filename
        if not isinstance(name, str) or error.filename2 is not None or Path(name).is_relative_to(scratch):
            raise
        raise CheckpointError(f"{name} cannot be read: {error.strerror}") from error


def leftovers(folder: Path) -> list[Path]:
    """What interrupted saves of a folder left next to it, and what running saves are writing."""
    starts = tuple(f".{_stem(folder)}.{kind}-" for kind in (_REPLACED, SAVING))
    try:
        return sorted(path for path in folder.parent.iterdir() if path.name.startswith(starts))
    except OSError:  # There is no such folder, or its files may be read but not listed.
        return []


def no_folder(folder: Path) -> CheckpointError:
    """The error for a folder that does not exist or is a file; it names what an interrupted save left instead."""
    if folder.exists():
        return CheckpointError(f"{folder} is a file, not a folder")
    kept = [path for path in leftovers(folder) if f".{_REPLACED}-" in path.name]
    if not kept:
        return CheckpointError(f"there is no folder {folder}")
    return CheckpointError(
        f"there is no folder {folder}: a save was interrupted while replacing it. Its old content is in {kept[0]}; "
        f"rename that to {folder.name}, or save again"
    )


def mention_leftovers(folder: Path) -> None:
    """Warn about what interrupted saves left next to a folder."""
    for path in leftovers(folder):
        if Lock.of(path, certain=True) is not None:
            warnings.warn(
                f"{path} is what an interrupted save left; {folder} itself is complete. The next save to that folder "
                "removes what was left, or remove it yourself",
                stacklevel=3,
            )


# --- writing ----------------------------------------------------------------------------------------------------------


class _Scratch:
    """The temporary folder that is being written.

    Its inode shows what is under its name. The steps that this process remembers do not show it, because an interrupt
    can come between any two instructions.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for _ in range(_TRIES):
            self.path = folder.parent / beside(folder, SAVING)
            self.path.mkdir()
            # Another process that tidies up may have considered the folder abandoned before it was locked.
            self.lock = Lock.of(self.path)
            if self.lock is not None:
                break
            with suppress(OSError):
                self.path.rmdir()
        self.inode = self.path.stat().st_ino
        self.aside: list[Path] = []

    def place(self, check: Check) -> None:
        """Move the folder to its final place."""
        try:
            self._place(check)
        except (CheckpointError, OSError) as error:
            kept = self._keep()
            raise WriteError(
                f"the written folder cannot go to its place and is in {kept} instead: {error}", kept=kept
            ) from error
        with suppress(PermissionError):  # The parent may be writable but not readable.
            force(self.folder.parent)

    def _place(self, check: Check) -> None:
        for _ in range(_TRIES):
            try:
                with suppress(FileNotFoundError):
                    if self.folder.is_dir():
                        shutil.copymode(self.folder, self.path)
                # The system renames a folder to a free name or to that of an empty folder, and to no other name.
                os.rename(self.path, self.folder)
                return
            except OSError as error:
                if not self.folder.exists():
                    if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                        continue  # Another process has moved what was there.
                    raise
            if not _may_replace(self.folder, check):
                continue
            try:
                if exchange(self.path, self.folder):
                    return
                self._set_aside()
            except FileNotFoundError:  # Another process has moved it.
                continue
        raise WriteError(f"{self.folder} cannot be replaced, because other processes keep writing it; try later")

    def _set_aside(self) -> None:
        """Move away what is there, so that the next attempt can put this folder there."""
        aside = self.folder.parent / beside(self.folder, _REPLACED)
        self.aside.append(aside)
        os.rename(self.folder, aside)

    def _keep(self) -> Path:
        """Keep the folder next to its place, under the first free name."""
        for number in range(2, _TRIES):
            kept = self.folder.with_name(f"{_stem(self.folder)}-{number}")
            if not kept.exists():
                with suppress(OSError):  # Another process has just taken this name.
                    os.rename(self.path, kept)
                    return kept
        os.rename(self.path, kept := self.folder.parent / f"{_stem(self.folder)}-{secrets.token_hex(4)}")
        return kept

    def clear(self, check: Check) -> None:
        """Remove what is under the temporary name: the written folder if it was not placed, or what it replaced."""
        with suppress(OSError):  # What cannot be removed is mentioned when the folder is loaded.
            for aside in reversed(self.aside):
                if not aside.exists():
                    continue
                if self.folder.exists():
                    _discard(aside, self.folder, check)
                else:
                    os.rename(aside, self.folder)
            if self.path.stat().st_ino == self.inode:
                shutil.rmtree(self.path, ignore_errors=True)
            else:
                _discard(self.path, self.folder, check)
        self.lock = None


def _may_replace(folder: Path, check: Check) -> bool:
    """Check what is there; False if another process has meanwhile put something else there.

    Raises:
        CheckpointError: What ``check`` raises.
    """
    there = _inode(folder)
    try:
        check(folder)
    except (CheckpointError, FileNotFoundError):
        if there is not None and there == _inode(folder):
            raise
        return False
    return True


def _inode(folder: Path) -> int | None:
    try:
        return folder.stat().st_ino
    except FileNotFoundError:
        return None


def _discard(old: Path, folder: Path, check: Check) -> None:
    """Remove a folder that was replaced, unless somebody has meanwhile put their own files into it."""
    try:
        check(old)
    except CheckpointError as error:
        kept = folder.parent / f"{_stem(folder)}-replaced-{secrets.token_hex(4)}"
        os.rename(old, kept)
        warnings.warn(f"{folder} was replaced, but what it held is kept in {kept}: {error}", stacklevel=2)
    else:
        _remove(old, folder)


def _remove(old: Path, folder: Path) -> None:
    """Remove what a save of a folder left, under a name which shows that it may be incomplete."""
    doomed = folder.parent / beside(folder, SAVING)
    os.rename(old, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


@contextmanager
def parents_of(folder: Path) -> Iterator[None]:
    """Make the parents of a folder, and remove those that were made if the block raises."""
    made = []
    for parent in folder.parents:
        if parent.exists():
            break
        made.append(parent)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):  # They are not empty.
            for parent in made:
                parent.rmdir()
        raise


# --- what others left -------------------------------------------------------------------------------------------------


def tidy(folder: Path) -> None:
    """Put back what an interrupted save has set aside, and remove what it wrote."""
    for path in leftovers(folder):
        # The lock is held until the folder is gone, because a process that has just made it locks it next.
        held = Lock.of(path, certain=True)
        if held is None:
            continue
        with suppress(OSError):  # Another process does the same.
            if f".{_REPLACED}-" in path.name and not folder.exists():
                os.rename(path, folder)
            else:
                _remove(path, folder)


def _stem(folder: Path) -> str:
    """The name of a folder, short enough for suffixes."""
    encoded = os.fsencode(folder.name)
    if len(encoded) <= _LONGEST:
        return folder.name
    return f"{encoded[: _LONGEST - 20].decode(errors='ignore')}-{hashlib.sha256(encoded).hexdigest()[:8]}"


def beside(folder: Path, kind: str) -> str:
    """A new name, next to a folder or file, for what is written or set aside."""
    return f"{beside_always(folder, kind)}-{secrets.token_hex(4)}"


def beside_always(folder: Path, kind: str) -> str:
    """A name next to a folder or file, always the same."""
    return f".{_stem(folder)}.{kind}"
