"""Memory of tensors in mapped files is given back, and no value is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fxquant.memory.bound import resident
from fxquant.memory.mappings import _OFTEN, give_back, give_back_freed, let_go

_ROWS, _COLUMNS = 4096, 2048  # 32 MiB of float32.


@pytest.fixture
def mapped(tmp_path: Path) -> Tensor:
    """A tensor in a mapped file."""
    values = torch.arange(_ROWS * _COLUMNS, dtype=torch.float32).view(_ROWS, _COLUMNS)
    save_file({"other": torch.ones(3, dtype=torch.float64), "a": values}, tmp_path / "a")
    with safe_open(tmp_path / "a", framework="pt") as file:
        found = file.get_tensor("a")
    assert isinstance(found, Tensor)
    return found


def test_memory_of_a_file_is_given_back_and_read_again(mapped: Tensor) -> None:
    total = float(mapped.double().sum())
    before = resident()
    assert give_back(mapped)
    assert resident() < before - 0.9 * mapped.nbytes
    assert float(mapped.double().sum()) == total
    assert give_back(torch.nn.Parameter(mapped[1024:2048], requires_grad=False))


def test_what_was_written_is_not_given_back(mapped: Tensor) -> None:
    mapped[7, 9] = -1.0
    assert not give_back(mapped)
    assert float(mapped[7, 9]) == -1.0
    assert give_back(mapped[2048:])  # No page of it was written to.


@pytest.mark.parametrize("kind", ["in memory", "of zeros", "small", "of a view", "on meta"])
def test_other_tensors_are_left_as_they_are(mapped: Tensor, kind: str) -> None:
    tensor = {
        "in memory": torch.ones(_ROWS, _COLUMNS),
        "of zeros": torch.zeros(_ROWS, _COLUMNS),
        "small": mapped[:2],
        "of a view": mapped.T,
        "on meta": torch.empty(_ROWS, _COLUMNS, device="meta"),
    }[kind]
    expected = None if tensor.is_meta else tensor.clone()
    assert not give_back(tensor)
    assert expected is None or torch.equal(tensor, expected)


def test_a_weight_that_was_replaced_leaves_memory(mapped: Tensor) -> None:
    total, before = float(mapped.double().sum()), resident()
    let_go(mapped)
    assert resident() < before - 0.9 * mapped.nbytes
    let_go(mapped.to("meta"))
    let_go(mapped + 1.0)  # In memory: it is freed with its last reference.
    assert float(mapped.double().sum()) == total


def test_freed_memory_that_the_allocator_holds_is_given_back() -> None:
    blocks = [torch.ones(1 << 20, dtype=torch.uint8) for _ in range(128)]
    before = resident()
    left = blocks[::2]  # So that the heap cannot simply become shorter.
    del blocks
    give_back_freed(_OFTEN)
    assert resident() < before - 0.8 * 64 * (1 << 20)
    assert all(bool((block == 1).all()) for block in left)


def test_what_was_freed_on_the_way_to_new_weights_is_given_back_too(mapped: Tensor) -> None:
    blocks = [torch.ones(1 << 20, dtype=torch.uint8) for _ in range(128)]
    before = resident()
    left = blocks[::2]
    del blocks
    for _ in range(1 + _OFTEN // mapped.nbytes):  # Weights whose values a file has.
        let_go(mapped)
    assert resident() < before - 0.8 * 64 * (1 << 20)
    assert len(left) == 64
