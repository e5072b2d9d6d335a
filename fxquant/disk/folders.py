"""Folders that are written whole or not at all, and that take the place of others in one step.

A folder is written beside its place, as ``.NAME.saving-XXXXXXXX``, forced to disk, and exchanged with what is there in
one step of the file system. Where there is none (it is ``renameat2`` of Linux with ``RENAME_EXCHANGE``), what is there
is renamed to ``.NAME.replaced-XXXXXXXX`` first. So one whole folder stands under its name, or under that one, whenever
the process ends. The next save of the same name puts it back, and removes what interrupted saves left; loading mentions
both.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from fxquant.disk.exchange import exchange, force, force_to_disk
from fxquant.disk.locks import Lock
from fxquant.errors import CheckpointError, WriteError

if sys.platform != "win32":
    pass

_TRIES = 100  # Of a step that another process can come in between.
_LONGEST = 200  # Bytes of a name, most file systems allow 255, to which the endings below are added.
_SAVING, _REPLACED = "saving", "replaced"

Check = Callable[[Path], None]


@contextmanager
def whole_folder(folder: Path, check: Check) -> Iterator[Path]:
    """Yield an empty folder to write into; afterwards it takes the place of ``folder``, and of what is there.

    If the block raises, what is there stays, and nothing else is left. If the block succeeds and the folder cannot go
    to its place, because something else has appeared there, it stays beside it, under a name that the error tells.

    Args:
        folder: Where to, resolved.
        check: Raises ``CheckpointError`` if what is at a path must not be replaced. It is called before writing, and
            again before anything is moved or removed.

    Raises:
        CheckpointError: What ``check`` raises before writing. Also if a file elsewhere cannot be read, by its name.
        WriteError: If the folder cannot be written, or something that must stay has appeared in its place.
    """
    _ready(folder, check)
    with writing(folder), _parents(folder):
        scratch = _Scratch(folder)
        try:
            with _blaming_sources(scratch.path):
                yield scratch.path
            force_to_disk(scratch.path)
            scratch.place(check)
        finally:
            scratch.clear(check)


def prepare(folder: Path, check: Check) -> None:
    """Find out whether a folder can be written, before anything takes time.

    What a killed save left behind is put back or removed.

    Raises:
        CheckpointError: What ``check`` raises.
        WriteError: If the folder cannot be made.
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
        _tidy(folder)
        check(folder)
    if _current_folder().is_relative_to(folder):
        raise WriteError(
            f"{folder} is, or holds, the current folder, which would be gone once another takes its place; choose "
            "another folder, or run this from elsewhere"
        )
    if os.path.ismount(folder):
        raise WriteError(f"{folder} is where a disk is mounted, so it cannot be exchanged; choose a folder in it")


def _current_folder() -> Path:
    with suppress(OSError):  # Somebody has removed it.
        return Path.cwd()
    return Path(os.devnull)


def check_writable(path: Path) -> None:
    """Try to make a path, with its parents, and a file in it; nothing is left.

    Raises:
        WriteError: If that fails: a folder that is read-only, a full disk, a name too long, a parent that is a file.
    """
    with writing(path):
        _try_to_make(path.resolve())  # A ".." in it would lead out of the folder in which it is tried.


def _try_to_make(path: Path) -> None:
    there = path
    while not there.exists():
        there = there.parent
    with tempfile.TemporaryDirectory(dir=there, prefix=".fxquant-") as trial:
        made = Path(trial, *path.relative_to(there).parts)
        made.mkdir(parents=True, exist_ok=True)
        _try_to_write(made)


def _try_to_write(folder: Path) -> None:
    (folder / "trial").write_bytes(b"x" * 4096)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says while a path is written into a :class:`WriteError`."""
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise WriteError(
            f"{path} cannot be written: {reason}; see to the disk and its permissions, or choose another place",
            errno=getattr(error, "errno", None),
        ) from error


@contextmanager
def _blaming_sources(scratch: Path) -> Iterator[None]:
    """Turn errors of files that are read while a folder is written into ones that name them, not the folder."""
    try:
        yield
    except shutil.Error as error:  # Of copytree, which lists what it could not copy.
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
    """What interrupted saves of a folder left beside it, and what saves that run are writing."""
    starts = tuple(f".{_stem(folder)}.{kind}-" for kind in (_REPLACED, _SAVING))
    try:
        return sorted(path for path in folder.parent.iterdir() if path.name.startswith(starts))
    except OSError:  # No such folder, or one whose files may be read and not listed.
        return []


def no_folder(folder: Path) -> CheckpointError:
    """The error for a folder that is not there, or is a file; it names what an interrupted save left in place of it."""
    if folder.exists():
        return CheckpointError(f"{folder} is a file, not a folder")
    kept = [path for path in leftovers(folder) if f".{_REPLACED}-" in path.name]
    if not kept:
        return CheckpointError(f"there is no folder {folder}")
    return CheckpointError(
        f"there is no folder {folder}: a save was interrupted while it replaced it. What it held is in {kept[0]}; "
        f"rename that to {folder.name}, or save again"
    )


def mention_leftovers(folder: Path) -> None:
    """Warn of what interrupted saves left beside a folder."""
    for path in leftovers(folder):
        if Lock.of(path, certain=True) is not None:
            warnings.warn(
                f"{path} is what an interrupted save left; {folder} itself is whole. The next save of that name "
                "removes it, or remove it yourself",
                stacklevel=3,
            )


# --- writing ----------------------------------------------------------------------------------------------------------


class _Scratch:
    """The folder that is being written.

    What lies under its name is told by its inode, never by what this process remembers of its own steps: an interrupt
    comes between any two instructions.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for _ in range(_TRIES):
            self.path = folder.parent / _beside(folder, _SAVING)
            self.path.mkdir()
            # Another process that tidies up may have taken the folder for abandoned before it was locked.
            self.lock = Lock.of(self.path)
            if self.lock is not None:
                break
            with suppress(OSError):
                self.path.rmdir()
        self.inode = self.path.stat().st_ino
        self.aside: list[Path] = []

    def place(self, check: Check) -> None:
        """Put the folder where it belongs."""
        try:
            self._place(check)
        except (CheckpointError, OSError) as error:
            kept = self._keep()
            raise WriteError(
                f"what was written cannot take its place, and is in {kept} instead: {error}", kept=kept
            ) from error
        with suppress(PermissionError):  # Of a parent that may be written and not read.
            force(self.folder.parent)

    def _place(self, check: Check) -> None:
        for _ in range(_TRIES):
            try:
                with suppress(FileNotFoundError):
                    if self.folder.is_dir():
                        shutil.copymode(self.folder, self.path)
                # The system puts a folder in the place of nothing, or of an empty folder, and never of another.
                os.rename(self.path, self.folder)
                return
            except OSError as error:
                if not self.folder.exists():
                    if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                        continue  # Another process has moved what was there.
                    raise
            if not self._may_replace(check):
                continue
            try:
                if exchange(self.path, self.folder):
                    return
                self._set_aside()
            except FileNotFoundError:  # Another process has moved it.
                continue
        raise WriteError(f"{self.folder} is written by others again and again; try later")

    def _may_replace(self, check: Check) -> bool:
        """Check what is there; False if another process has put something else there meanwhile.

        Raises:
            CheckpointError: What ``check`` raises.
        """
        there = _inode(self.folder)
        try:
            check(self.folder)
        except (CheckpointError, FileNotFoundError):
            if there is not None and there == _inode(self.folder):
                raise
            return False
        return True

    def _set_aside(self) -> None:
        """Move what is there away; what comes next puts this folder there."""
        aside = self.folder.parent / _beside(self.folder, _REPLACED)
        self.aside.append(aside)
        os.rename(self.folder, aside)

    def _keep(self) -> Path:
        """Keep the folder beside its place, under the first free name."""
        for number in range(2, _TRIES):
            kept = self.folder.with_name(f"{_stem(self.folder)}-{number}")
            if not kept.exists():
                with suppress(OSError):  # Somebody else has taken that name just now.
                    os.rename(self.path, kept)
                    return kept
        os.rename(self.path, kept := self.folder.parent / f"{_stem(self.folder)}-{secrets.token_hex(4)}")
        return kept

    def clear(self, check: Check) -> None:
        """Remove what is under the scratch name: what was written and has no place, or what it has replaced."""
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


def _inode(folder: Path) -> int | None:
    try:
        return folder.stat().st_ino
    except FileNotFoundError:
        return None


def _discard(old: Path, folder: Path, check: Check) -> None:
    """Remove a folder that was replaced, unless somebody has put something of theirs into it meanwhile."""
    try:
        check(old)
    except CheckpointError as error:
        kept = folder.parent / f"{_stem(folder)}-replaced-{secrets.token_hex(4)}"
        os.rename(old, kept)
        warnings.warn(f"{folder} was replaced, and what it held is kept in {kept}: {error}", stacklevel=2)
    else:
        _remove(old, folder)


def _remove(old: Path, folder: Path) -> None:
    """Remove what a save of a folder left, under a name that says that it may be in parts."""
    doomed = folder.parent / _beside(folder, _SAVING)
    os.rename(old, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


@contextmanager
def _parents(folder: Path) -> Iterator[None]:
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
        with suppress(OSError):  # They hold something.
            for parent in made:
                parent.rmdir()
        raise


# --- what others left -------------------------------------------------------------------------------------------------


def _tidy(folder: Path) -> None:
    """Put back what an interrupted save has set aside, and remove what it wrote."""
    for path in leftovers(folder):
        held = Lock.of(path, certain=True)  # Held until it is away, for a process that has just made it locks it next.
        if held is None:
            continue
        with suppress(OSError):  # Another process does the same.
            if f".{_REPLACED}-" in path.name and not folder.exists():
                os.rename(path, folder)
            else:
                _remove(path, folder)


def _stem(folder: Path) -> str:
    """The name of a folder, short enough for endings."""
    encoded = os.fsencode(folder.name)
    if len(encoded) <= _LONGEST:
        return folder.name
    return f"{encoded[: _LONGEST - 20].decode(errors='ignore')}-{hashlib.sha256(encoded).hexdigest()[:8]}"


def _beside(folder: Path, kind: str) -> str:
    return f".{_stem(folder)}.{kind}-{secrets.token_hex(4)}"
