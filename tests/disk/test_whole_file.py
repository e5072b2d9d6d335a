"""Files that are written completely or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from fxquant.disk.whole_file import whole_file
from fxquant.errors import WriteError


def write(path: Path, text: str) -> None:
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("name", ["plan.json", "config.json", "model.safetensors"])
def test_a_file_of_a_model_is_not_replaced(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with whole_file(path) as written:
        written.write_text("first")
    with pytest.raises(WriteError, match=f"{name} is a file of a model"), whole_file(path) as written:
        written.write_text("second")
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


def test_a_file_replaces_the_one_that_is_there(tmp_path: Path) -> None:
    for text in ("one", "two"):
        write(tmp_path / "new" / "file", text)
        assert (tmp_path / "new" / "file").read_text(encoding="utf-8") == text
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


def test_an_error_leaves_neither_a_file_nor_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "new" / "newer" / "file") as unfinished:
        unfinished.write_text("some", encoding="utf-8")
        1 / 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["f" * 250, "\u8868" * 80])
def test_long_names(tmp_path: Path, name: str) -> None:
    """Of 250 and 240 bytes, where 255 are allowed."""
    write(tmp_path / name, "some")
    assert [path.name for path in tmp_path.iterdir()] == [name]
