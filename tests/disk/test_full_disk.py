"""A disk that takes no more leaves what was there, and the error says what to do."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from fxquant.disk import files
from fxquant.disk.files import write_tensors
from fxquant.disk.finished_work import working_in
from fxquant.disk.folders import whole_folder
from fxquant.disk.whole_file import whole_file
from fxquant.errors import WriteError

LIMIT = 20_000


def limited(work: Callable[[], None]) -> str:
    """What the error says that work raises in a process that can write no file of more than ``LIMIT`` bytes."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        said = "nothing"
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
            work()
        except WriteError as error:
            said = f"{error.errno} {error}"
        finally:
            os.write(writer, said.encode())
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as pipe:
        return pipe.read()


def save(folder: Path, elements: int) -> None:
    with whole_folder(folder, lambda _: None) as path:
        write_tensors({"x": torch.zeros(elements)}, path / "model.safetensors")


def test_a_folder_stays_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "q"
    save(folder, 100)
    before = (folder / "model.safetensors").read_bytes()
    said = limited(lambda: save(folder, 100_000))
    assert said.startswith("27 ") and f"{folder} cannot be written" in said
    assert "raise the limit of the size of files (ulimit -f), and what was there before is unchanged" in said
    assert (folder / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_finished_work_stays_as_it_was(tmp_path: Path) -> None:
    with working_in(tmp_path / "work") as work:
        assert work is not None
        work.save("p", {}, {"x": torch.zeros(100)})
        said = limited(lambda: work.save("p", {}, {"x": torch.zeros(100_000)}))
        assert "p.safetensors cannot be written" in said
        found = work.load("p", {})
        assert found is not None and len(found.tensors["x"]) == 100
        assert [path.name for path in work.folder.iterdir()] == ["p.safetensors"]


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), SafetensorError("IoError(No space left on device (os error 28))")],
    ids=["system", "safetensors"],
)
def test_the_error_says_where_to_free_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(files, "save_file", full)
    told = (
        rf"q cannot be written: .*No space left on device.*; free space on the disk of {tmp_path}, which has \d.* left"
    )
    with pytest.raises(WriteError, match=told) as caught:
        save(tmp_path / "q", 1)
    assert caught.value.errno == 28
    with pytest.raises(WriteError, match="free space on the disk of"), whole_file(tmp_path / "new" / "file"):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())
