"""Folders that are written whole or not at all: interrupted anywhere, raced, refused, on disks that lack something."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from fxquant.disk import folders, locks
from fxquant.disk.files import refuse_to_replace
from fxquant.disk.folders import check_writable, no_folder, prepare, whole_folder
from fxquant.errors import CheckpointError, WriteError

OLD, NEW = {"mark": "old", "tensors": "old"}, {"mark": "new", "tensors": "new"}


@pytest.fixture(params=["exchange", "renames"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With and without the exchange in one step."""
    if request.param == "renames":
        monkeypatch.setattr(folders, "exchange", lambda *_: False)
    return str(request.param)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting for the disk."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def check(overwrite: bool) -> Callable[[Path], None]:
    return lambda path: refuse_to_replace(path, overwrite, lambda file: file.name in OLD, "mark")


def put(folder: Path, content: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in content.items():
        (folder / name).write_text(text)


def save(folder: Path, content: dict[str, str] = NEW, overwrite: bool = True) -> None:
    with whole_folder(folder, check(overwrite)) as written:
        put(written, content)


def held(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- interrupts -----------------------------------------------------------------------------------------------------


ROOM = str(Path(folders.__file__).parent)
SWAP = ("place", "_place", "_set_aside", "exchange", "clear", "_discard", "_remove")


@contextmanager
def interrupted_at(*numbers: int, only: tuple[str, ...] = ()) -> Iterator[list[int]]:
    """Raise KeyboardInterrupt before these instructions of fxquant/disk/; yields a list with their count.

    Args:
        numbers: Counted from 1.
        only: Functions whose instructions count; all if there are none.
    """
    count = [0]

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(ROOM) or (only and frame.f_code.co_name not in only):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            count[0] += 1
            if count[0] in numbers:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield count
    finally:
        sys.settrace(before)


def instructions(folder: Path, only: tuple[str, ...] = ()) -> int:
    """How many instructions a save takes."""
    with interrupted_at(only=only) as count:
        save(folder)
    return count[0]


def is_whole(folder: Path) -> bool:
    """Whether the old or the new folder stands, and whether the next save finds it and cleans up."""
    stands = folder if folder.is_dir() else next(path for path in folders.leftovers(folder) if "replaced" in path.name)
    whole = held(stands) in (OLD, NEW)
    if stands != folder:
        assert str(stands) in str(no_folder(folder))
    save(folder, {"mark": "next", "tensors": "next"})
    return whole and held(folder)["mark"] == "next" and names(folder.parent) == [folder.name]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Interrupts where Python drops them.
@pytest.mark.parametrize(("only", "step"), [(SWAP, 1), ((), 13)], ids=["swap", "all"])
def test_an_interrupt_before_any_instruction_loses_nothing(
    tmp_path: Path, system: str, quick: None, only: tuple[str, ...], step: int
) -> None:
    put(tmp_path / "counted" / "q", OLD)
    total = instructions(tmp_path / "counted" / "q", only)
    assert total > 100
    for number in range(1, total + 1, step):
        folder = tmp_path / str(number) / "q"
        put(folder, OLD)
        with suppress(KeyboardInterrupt), interrupted_at(number, only=only):
            save(folder)
        assert is_whole(folder), number


def test_two_interrupts_lose_nothing(tmp_path: Path, system: str, quick: None) -> None:
    """Somebody who presses Ctrl-C again, also while the first is being dealt with."""
    put(tmp_path / "counted" / "q", OLD)
    total = instructions(tmp_path / "counted" / "q", SWAP)
    for number in range(1, total, 9):
        for later in (1, 5, 20, 60):
            folder = tmp_path / f"{number}-{later}" / "q"
            put(folder, OLD)
            with suppress(KeyboardInterrupt), interrupted_at(number, number + later, only=SWAP):
                save(folder)
            assert is_whole(folder), (number, later)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_while_nothing_was_there(tmp_path: Path, quick: None) -> None:
    total = instructions(tmp_path / "counted" / "q")
    for number in range(1, total, 17):
        folder = tmp_path / str(number) / "q"
        with suppress(KeyboardInterrupt), interrupted_at(number):
            save(folder)
        assert not folder.exists() or held(folder) == NEW
        save(folder)
        assert names(folder.parent) == ["q"]


# --- races ------------------------------------------------------------------------------------------------------------


def test_who_comes_second_keeps_the_result_beside(tmp_path: Path, system: str) -> None:
    folder = tmp_path / "q"
    refused = pytest.raises(WriteError, match=r"is in .*q-2 instead: .*q exists")
    with refused as caught, whole_folder(folder, check(False)) as written:
        put(written, NEW)
        put(folder, OLD)
    assert caught.value.kept == tmp_path / "q-2"
    assert (held(folder), held(tmp_path / "q-2")) == (OLD, NEW)
    assert names(tmp_path) == ["q", "q-2"]


def test_a_file_that_somebody_puts_there_meanwhile(tmp_path: Path, system: str) -> None:
    folder = tmp_path / "q"
    with pytest.raises(WriteError, match=r"q-2 instead: .*is a file"), whole_folder(folder, check(True)) as written:
        put(written, NEW)
        mode = written.stat().st_mode
        folder.touch(0o600)
    assert (tmp_path / "q-2").stat().st_mode == mode  # One can still open it.


@pytest.mark.parametrize("overwrite", [False, True])
def test_threads_that_save_at_once(tmp_path: Path, system: str, overwrite: bool) -> None:
    for number in range(10):
        folder, start, kept = tmp_path / str(number) / "q", threading.Barrier(4), []

        def saver(text: str, folder: Path = folder, start: Any = start, kept: list[Any] = kept) -> None:
            start.wait()
            try:
                save(folder, {"mark": text, "tensors": text}, overwrite)
                kept.append(text)
            except WriteError as error:
                assert error.kept is not None
                assert held(error.kept)["tensors"] == text
            except CheckpointError as error:
                assert not overwrite
                assert "exists" in str(error)

        threads = [threading.Thread(target=saver, args=(text,)) for text in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        content = held(folder)
        assert content["mark"] == content["tensors"]
        assert content["mark"] in kept
        assert len(kept) == (4 if overwrite else 1)
        save(folder)
        assert not [name for name in names(folder.parent) if name.startswith(".")]


@pytest.mark.parametrize("moved", [True, False], ids=["while it is checked", "before it is checked"])
def test_a_folder_that_another_saver_moves_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: bool
) -> None:
    """As two renames do, between which there is none: the check finds no files, or the first rename a full folder."""
    folder, aside = tmp_path / "q", tmp_path / "aside"
    monkeypatch.setattr(folders, "exchange", lambda *_: False)
    put(folder, OLD)
    rename, times = os.rename, []

    def late(path: Path) -> None:
        times.append(path)
        if moved and len(times) == 2:
            rename(folder, aside)
            raise CheckpointError("it holds what a checkpoint does not")
        refuse_to_replace(path, True, lambda file: file.name in OLD, "mark")

    def full(source: Any, target: Any) -> None:
        if not moved and Path(target) == folder and not aside.exists():
            rename(folder, aside)
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        rename(source, target)

    monkeypatch.setattr(os, "rename", full)
    with whole_folder(folder, late) as written:
        put(written, NEW)
    assert (held(folder), held(aside), names(tmp_path)) == (NEW, OLD, ["aside", "q"])


def test_what_somebody_puts_there_meanwhile_is_kept(
    tmp_path: Path, system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "q"
    put(folder, OLD)
    with pytest.raises(WriteError, match=r"q-2 instead: .*thesis\.tex"), whole_folder(folder, check(True)) as written:
        put(written, NEW)
        (folder / "thesis.tex").write_text("years of it")
    assert held(folder) == {**OLD, "thesis.tex": "years of it"}
    (folder / "thesis.tex").unlink()

    def late(path: Path) -> None:
        refuse_to_replace(path, True, lambda file: file.name in OLD, "mark")
        if path.exists() and late.seen:  # type: ignore[attr-defined]  # After the last check before the exchange.
            (path / "thesis.tex").write_text("years of it")
        late.seen = True  # type: ignore[attr-defined]

    late.seen = False  # type: ignore[attr-defined]
    with pytest.warns(UserWarning, match="what it held is kept in"), whole_folder(folder, late) as written:
        put(written, NEW)
    (kept,) = tmp_path.glob("q-replaced-*")
    assert (held(folder), held(kept)) == (NEW, {**OLD, "thesis.tex": "years of it"})


# --- what was left by a killed process --------------------------------------------------------------------------------


def test_what_a_killed_save_set_aside_is_named_and_put_back(tmp_path: Path) -> None:
    folder = tmp_path / "q"
    put(tmp_path / ".q.replaced-0123abcd", OLD)
    put(tmp_path / ".q.saving-0123abcd", {"mark": "half"})
    assert "q.replaced-0123abcd; rename that to q" in str(no_folder(folder))
    with pytest.raises(CheckpointError, match="exists"):
        save(folder, overwrite=False)
    assert (held(folder), names(tmp_path)) == (OLD, ["q"])


def test_what_others_are_writing_stays(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    folder = tmp_path / "q"
    with whole_folder(folder, check(True)) as slow:
        put(slow, NEW)
        save(folder, OLD)
        folders.mention_leftovers(folder)
        assert held(slow) == NEW
    assert (held(folder), names(tmp_path)) == (NEW, ["q"])
    assert not recwarn.list


def test_leftovers_are_mentioned(tmp_path: Path) -> None:
    put(tmp_path / ".q.saving-0123abcd", NEW)
    put(tmp_path / ".q.other.saving-0123abcd", NEW)
    with pytest.warns(UserWarning, match=r"q\.saving-0123abcd is what an interrupted save left") as seen:
        folders.mention_leftovers(tmp_path / "q")
    assert len(seen) == 1
    save(tmp_path / "q")
    assert names(tmp_path) == [".q.other.saving-0123abcd", "q"]


def test_without_locks_nothing_is_taken_for_abandoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    put(tmp_path / ".q.saving-0123abcd", OLD)
    save(tmp_path / "q")
    assert (held(tmp_path / "q"), held(tmp_path / ".q.saving-0123abcd")) == (NEW, OLD)
    monkeypatch.setattr(sys, "platform", "win32")
    save(tmp_path / "q", OLD)
    assert (held(tmp_path / "q"), names(tmp_path)) == (OLD, [".q.saving-0123abcd", "q"])


# --- disks ------------------------------------------------------------------------------------------------------------


def failing(number: int) -> Callable[..., None]:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_disk_that_fails_is_told_by_name(
    tmp_path: Path, system: str, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    folder = tmp_path / "made" / "q"
    refused = pytest.raises(WriteError, match=f"q cannot be written: {os.strerror(number)}")
    with refused as caught, whole_folder(folder, check(True)):
        failing(number)()
    assert caught.value.errno == number
    assert isinstance(caught.value, OSError)
    assert names(tmp_path) == []
    put(folder, OLD)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", failing(number))
        with pytest.raises(WriteError):
            save(folder)
    assert (held(folder), names(folder.parent)) == (OLD, ["q"])
    with monkeypatch.context() as patched:
        patched.setattr(Path, "mkdir", failing(number))
        for place in (folder, tmp_path / "other" / "q"):
            with pytest.raises(WriteError, match=f"q cannot be written: {os.strerror(number)}"):
                prepare(place, check(True))


def test_an_exchange_that_fails(tmp_path: Path, system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "q"
    put(folder, OLD)
    rename = os.rename

    def flaky(source: Any, target: Any) -> None:
        if Path(target) == folder and ".saving-" in str(source):
            raise OSError(errno.EIO, "input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", flaky)
    if system == "exchange":
        monkeypatch.setattr(folders, "exchange", failing(errno.EIO))
    with pytest.raises(WriteError, match=r"q-2 instead: .*nput/output error"):
        save(folder)
    assert (held(folder), held(tmp_path / "q-2"), names(tmp_path)) == (OLD, NEW, ["q", "q-2"])


@pytest.mark.parametrize("place", ["file/q", "file", "x" * 256, "x" * 300 + "/q"])
def test_places_where_no_folder_can_be(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError):
        prepare(tmp_path / place, check(True))
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("place", ["a/../../q/x", "../a/../q", "q"])
def test_trying_a_place_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    check_writable(Path(place))
    assert (names(tmp_path), names(tmp_path / "here")) == (["here"], [])


def test_files_that_cannot_be_read_are_not_blamed_on_the_folder(tmp_path: Path) -> None:
    put(tmp_path / "source", OLD)
    (tmp_path / "source" / "gone").symlink_to(tmp_path / "nowhere")
    for read, said in (
        (lambda _: (tmp_path / "nowhere").read_bytes(), r"/nowhere cannot be read: No such file"),
        (lambda to: shutil.copytree(tmp_path / "source", to / "copy"), r"source/gone cannot be copied: .*No such file"),
    ):
        with pytest.raises(CheckpointError, match=said) as caught, whole_folder(tmp_path / "q", check(True)) as written:
            read(written)
        assert not isinstance(caught.value, WriteError)
    with pytest.raises(WriteError, match="q cannot be written"), whole_folder(tmp_path / "q", check(True)) as written:
        (written / "no" / "such" / "folder").touch()
    assert names(tmp_path) == ["source"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(WriteError, match="q cannot be written: Permission denied"):
        prepare(tmp_path / "q", check(True))
    tmp_path.chmod(0o700)


def test_a_parent_that_may_be_written_and_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def closed(path: Any, *rest: Any, **options: Any) -> int:
        if Path(path) == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *rest, **options)

    monkeypatch.setattr(os, "open", closed)
    put(tmp_path / "q", OLD)
    save(tmp_path / "q")
    assert (held(tmp_path / "q"), names(tmp_path)) == (NEW, ["q"])


def test_the_longest_names(tmp_path: Path) -> None:
    for name in ("é" * 127, "x" * 255, "x" * 254 + "y"):
        save(tmp_path / name, OLD)
        save(tmp_path / name)
        assert held(tmp_path / name) == NEW
    assert len(names(tmp_path)) == 3


def test_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever stands in it would find it empty, and any path from there would lead nowhere."""
    for content in ({}, OLD):
        put(tmp_path / "q", content)
        monkeypatch.chdir(tmp_path / "q")
        for write in (save, lambda folder: prepare(folder, check(True))):
            with pytest.raises(WriteError, match=r"the current folder, .*run this from elsewhere"):
                write(tmp_path / "q")
        assert held(Path.cwd()) == content
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "q")
    assert held(tmp_path / "q") == NEW


def test_a_mounted_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "q")
    with pytest.raises(WriteError, match="where a disk is mounted"):
        save(tmp_path / "q")


def test_permissions(tmp_path: Path) -> None:
    save(tmp_path / "q")
    (tmp_path / "plain").mkdir()
    mode = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert stat.S_IMODE((tmp_path / "q").stat().st_mode) == mode
    (tmp_path / "q").chmod(0o700)  # Whoever closed a folder keeps it closed.
    save(tmp_path / "q", OLD)
    assert stat.S_IMODE((tmp_path / "q").stat().st_mode) == 0o700


def test_a_folder_that_another_saver_replaces_during_the_first_check(tmp_path: Path) -> None:
    folder, moved = tmp_path / "q", []
    put(folder, OLD)

    def checking(path: Path) -> None:
        if not moved:
            moved.append(path.rename(tmp_path / "moved"))
            put(folder, OLD)
            raise CheckpointError("what was listed is not there")
        check(True)(path)

    with whole_folder(folder, checking) as written:
        for name, text in NEW.items():
            (written / name).write_text(text)
    assert held(folder) == NEW


def test_a_trial_that_was_killed_leaves_nothing(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        folders._try_to_write = lambda folder: (os.write(writer, b"."), time.sleep(60))  # type: ignore[assignment]
        folders.check_writable(tmp_path / "a" / "b")
    os.read(reader, 1)
    check_writable(tmp_path / "a" / "b")
    assert len(names(tmp_path)) == 1  # That of a process that still runs.
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    check_writable(tmp_path / "a" / "b")
    assert names(tmp_path) == []
