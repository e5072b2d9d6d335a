"""Tensors in files without a name."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fxquant.errors import WriteError
from fxquant.memory.bound import resident
from fxquant.memory.scratch import Scratch

_MIB = 1 << 20


def _file_bytes() -> int:
    """Bytes on the disk of the files without a name that this process has open."""
    found = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if "(deleted)" in os.readlink(entry):
                found += entry.stat().st_blocks * 512
        except FileNotFoundError:  # The one that lists the folder.
            continue
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.float64])
def test_values_and_strides_stay(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.randint(0, 100, (6, 50)).to(dtype).T
    made = Scratch(tmp_path).copy(tensor)
    assert made.dtype == dtype and made.stride() == tensor.stride()
    assert torch.equal(made.view(torch.uint8), tensor.view(torch.uint8)) if dtype == torch.uint8 else True
    assert torch.equal(made.double(), tensor.double())
    assert not list(tmp_path.iterdir())


def test_repeated_values_are_stored_once(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).reshape(3, 1, 4).expand(3, 1000, 4)
    scratch = Scratch(tmp_path)
    made = scratch.copy(tensor)
    assert torch.equal(made, tensor) and made.stride() == tensor.stride() and scratch.nbytes <= 4096
    part = torch.arange(24.0).reshape(4, 6)[:, 1:3]
    assert torch.equal(scratch.copy(part), part) and scratch.copy(part).stride() == part.stride()


def test_a_forked_process_does_not_free_tensors_of_its_parent(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    made = [scratch.copy(torch.full((1000,), 7.0))]
    child = os.fork()
    if not child:
        made.clear()
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    assert torch.equal(made[0], torch.full((1000,), 7.0))


def test_values_survive_when_memory_is_given_back(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    made = scratch.copy(torch.arange(8 * _MIB, dtype=torch.float32))
    before = [float(made.sum()), resident()][1]  # Reading brings all of it into memory.
    scratch.release()
    assert before - resident() > 24 * _MIB
    made[5] = -1
    scratch.release()
    assert made[5] == -1 and torch.equal(made[6:], torch.arange(6, 8 * _MIB, dtype=torch.float32))


def test_room_on_the_disk_is_free_again_when_a_tensor_ends(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    first, second = (scratch.copy(torch.ones(16 * _MIB)) for _ in range(2))
    gc.collect()  # What other tests left.
    before, view = _file_bytes(), nn.Parameter(first).detach()[3:]
    del first
    gc.collect()
    # File systems add and drop blocks of their own while they write.
    assert abs(_file_bytes() - before) < _MIB and float(view.sum()) == 16 * _MIB - 3
    del view
    gc.collect()
    assert abs(before - _file_bytes() - 64 * _MIB) < _MIB
    assert scratch.nbytes == 64 * _MIB and float(second.sum()) == 16 * _MIB


def test_a_tensor_in_a_file_is_not_copied_again(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    made = scratch.copy(torch.ones(100, 100))
    assert scratch.copy(made.detach()) is not None and scratch.copy(made).data_ptr() == made.data_ptr()
    assert not scratch.holds(torch.ones(3))


def test_tensors_without_elements(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    assert scratch.empty((0, 3), torch.float32).shape == (0, 3)
    assert scratch.copy(torch.ones(0)).shape == (0,)


def test_a_new_tensor_is_zero_also_where_one_was_before(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    for _ in range(3):
        made: Tensor = scratch.empty((1000,), torch.float32)
        assert not made.any()
        made.fill_(7)


def test_a_full_disk_is_an_error_and_not_a_signal(tmp_path: Path) -> None:
    kept = Scratch(tmp_path).copy(torch.ones(100))
    with pytest.raises(WriteError, match=r"no room for .* GB more in .*scratch="):
        Scratch(tmp_path).empty((1 << 50,), torch.uint8)
    assert float(kept.sum()) == 100
