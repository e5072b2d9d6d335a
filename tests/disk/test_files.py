"""Tensors on disk: what was written is read, a part of the file at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fxquant.disk import files
from fxquant.errors import BackendError, CheckpointError

CPU = torch.device("cpu")


def some() -> dict[str, Tensor]:
    base = torch.randn(6, 4)
    return {
        "a": base,
        "shares memory": base[:3],
        "complex": torch.randn(2, 3, dtype=torch.complex128),
        "out of order": base.t(),
        "codes": torch.randint(0, 256, (7,), dtype=torch.uint8),
        "number": torch.tensor(2.5),
    }


@pytest.mark.parametrize("part", [1, 100, 64 << 20])
def test_what_was_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int) -> None:
    monkeypatch.setattr(files, "_PART", part)
    tensors = some()
    files.write_tensors(tensors, tmp_path / "t.safetensors")
    read = files.load_tensors(tmp_path / "t.safetensors", CPU)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_a_part_of_the_file_is_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_PART", 100)
    files.write_tensors({str(i): torch.ones(20) for i in range(6)}, tmp_path / "t.safetensors")
    opened, real = [], files.safe_open
    monkeypatch.setattr(files, "safe_open", lambda *a, **k: opened.append(1) or real(*a, **k))
    files.load_tensors(tmp_path / "t.safetensors", CPU)
    assert len(opened) == 1 + 3  # The names; two tensors of 80 bytes each time.


def test_what_is_taken_is_the_callers_to_say(tmp_path: Path) -> None:
    files.write_tensors(some(), tmp_path / "t.safetensors")
    read = files.load_tensors(tmp_path / "t.safetensors", CPU, lambda name, t: t.sum() if name == "a" else t.clone())
    assert read["a"].dim() == 0

    def refuse(name: str, tensor: Tensor) -> Tensor:
        raise BackendError("not here")

    with pytest.raises(BackendError, match="not here"):
        files.load_tensors(tmp_path / "t.safetensors", CPU, refuse)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "t.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"t\.safetensors cannot be read as safetensors"):
        files.load_tensors(tmp_path / "t.safetensors", CPU)


@pytest.mark.parametrize("path", ["d/plan.json", "plan.json", "/d/plan.json"])
def test_an_error_names_the_file_also_in_a_folder_with_a_short_name(path: str) -> None:
    with pytest.raises(CheckpointError, match="^" + path + ": the field is bad"), files.blaming(Path(path)):
        raise CheckpointError("the field is bad")
    with pytest.raises(CheckpointError, match="^" + path + " is bad"), files.blaming(Path(path)):
        raise CheckpointError(path + " is bad")
