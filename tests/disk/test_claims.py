"""Of two commands that work for one folder, the second is refused at once."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from fxquant.disk.claims import claimed
from fxquant.errors import FolderInUseError


def test_the_second_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "q"
    refused = pytest.raises(FolderInUseError, match=r"another process is making .*q; wait")
    with claimed(folder), claimed(tmp_path / "new" / "other"), refused, claimed(folder):
        pass
    assert not list(tmp_path.iterdir())


def test_what_was_made_meanwhile_stays(tmp_path: Path) -> None:
    with claimed(tmp_path / "new" / "q"):
        (tmp_path / "new" / "q").mkdir()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["q"]


def test_a_killed_process_blocks_nobody(tmp_path: Path) -> None:
    folder = tmp_path / "q"
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        with claimed(folder):
            os.write(writer, b".")
            signal.pause()
    os.read(reader, 1)
    with pytest.raises(FolderInUseError), claimed(folder):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with claimed(folder):
        pass
    assert not list(tmp_path.iterdir())
