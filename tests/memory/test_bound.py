"""The bound on the resident set."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import fx, nn

from fxquant.errors import ConfigurationError, MemoryLimitError
from fxquant.ir.fingerprint import Fingerprint
from fxquant.memory import bound as module
from fxquant.memory.bound import current, kept, limit_memory, read_size, resident, zeros
from fxquant.memory.mappings import FileWeights
from fxquant.runtime.float_model import check_weights, weights_digest, whole_digest
from tests.memory.tight import tight

_MIB = 1 << 20


def _mapped(folder: Path, rows: int = 1024) -> dict[str, torch.Tensor]:
    save_file({"a": torch.randn(rows, 1024), "b": torch.randn(rows, 1024)}, folder / "w.safetensors")
    return load_file(folder / "w.safetensors")


@pytest.mark.parametrize(("text", "size"), [("8GB", 8e9), ("2GiB", 2**31), ("500MB", 5e8), (12345, 12345)])
def test_sizes(text: str | int, size: float) -> None:
    assert read_size(text) == size


@pytest.mark.parametrize("text", ["much", "", "-3GB", 0, True, "nan", "8 apples"])
def test_what_is_not_a_size(text: str | int) -> None:
    with pytest.raises(ConfigurationError, match="is not a size; write 8GB"):
        read_size(text)


def test_without_a_bound_nothing_moves() -> None:
    tensor = torch.ones(1000, 1000)
    with limit_memory(None) as found:
        assert found is None and current() is None and kept(tensor) is tensor
        assert zeros((3, 4), torch.float16).shape == (3, 4)


def test_large_tensors_move_and_small_ones_stay(tmp_path: Path) -> None:
    with limit_memory("64GB", tmp_path) as found:
        assert found is not None
        large, small = torch.ones(1000, 1000), torch.ones(3)
        made = kept(large)
        assert found.scratch.holds(made) and torch.equal(made, large) and kept(made) is made
        assert kept(small) is small
        assert found.scratch.holds(zeros((1000, 1000), torch.float32))
        assert not found.scratch.holds(zeros((3,), torch.float32))
    assert current() is None and torch.equal(made, large)


def test_the_watcher_gives_memory_back(tmp_path: Path) -> None:
    weights = _mapped(tmp_path, 16 * 1024)
    model = nn.Linear(1024, 16 * 1024, bias=False)
    model.weight = nn.Parameter(weights["a"])
    with tight(tmp_path) as found:
        found.place_weights(model)
        made, total = kept(weights["b"].clone()), float(model.weight.detach().double().sum())
        before = threading.active_count()
        for _ in range(200):
            found._ended.wait(0.01)
            if resident() < found.peak - 48 * _MIB:
                break
        assert resident() < found.peak - 48 * _MIB and before
        assert torch.equal(made, weights["b"]) and float(model.weight.detach().double().sum()) == total
    assert not [thread for thread in threading.enumerate() if thread.name == "fxquant-memory"]


def test_weights_stay_in_their_file_if_it_has_them(tmp_path: Path) -> None:
    weights = _mapped(tmp_path)
    model = nn.Linear(1024, 1024)
    model.weight = nn.Parameter(weights["a"])
    place = model.weight.data_ptr()
    with tight(tmp_path) as found:
        found.place_weights(model)
        assert model.weight.data_ptr() == place and found.scratch.holds(model.bias)


def test_weights_that_were_changed_after_loading_keep_their_values(tmp_path: Path) -> None:
    weights = _mapped(tmp_path)
    weights["a"][0, 0] = 77.0  # As fusing a LoRA does.
    model = nn.Linear(1024, 1024, bias=False)
    model.weight = nn.Parameter(weights["a"])
    with tight(tmp_path) as found:
        found.place_weights(model)
        found.release()
        assert model.weight[0, 0] == 77.0


def test_a_file_that_changes_later_is_left_in_memory(tmp_path: Path) -> None:
    weights = _mapped(tmp_path)
    held = FileWeights()
    assert held.take([weights["a"]]) == []
    weights["b"][3, 3] = 55.0
    held.release()
    assert weights["b"][3, 3] == 55.0


def test_weights_that_share_memory_still_do(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64, bias=False)})
    both = torch.randn(2, 64, 64)
    model["a"].weight = nn.Parameter(both[0])
    model["b"].weight = nn.Parameter(both[1].T)
    model["a"].bias = nn.Parameter(both[0, 0])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with tight(tmp_path) as found:
        found.place_weights(model)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert model["a"].weight.data_ptr() == model["a"].bias.data_ptr() != both.data_ptr()
        assert model["b"].weight.stride() == (1, 64)


def test_a_bound_that_is_too_small_says_what_would_do(tmp_path: Path) -> None:
    small = limit_memory("1MB", tmp_path)
    with pytest.raises(MemoryLimitError, match=r"max_memory=0.01GB is too small: .* Give at least \d") as raised, small:
        pass
    assert resident() * 0.8 < raised.value.smallest < resident() * 1.2
    with limit_memory("64GB", tmp_path) as found:
        assert found is not None
        found.require(1 << 30, "a layer")
        with pytest.raises(MemoryLimitError, match=r"a layer needs 100\.00GB at a time"):
            found.require(100 * 10**9, "a layer")


def test_one_bound_at_a_time(tmp_path: Path) -> None:
    second = limit_memory("32GB", tmp_path)
    with limit_memory("64GB", tmp_path), pytest.raises(ConfigurationError, match="given twice"), second:
        pass
    assert current() is None


def test_of_threads_that_enter_at_once_one_is_let_in(tmp_path: Path) -> None:
    ready, leave = threading.Barrier(4), threading.Event()
    entered: list[int] = []
    refused: list[ConfigurationError] = []

    def enter(number: int) -> None:
        ready.wait()
        try:
            with limit_memory("64GB", tmp_path):
                entered.append(number)
                leave.wait(60)
        except ConfigurationError as error:
            refused.append(error)
            if len(refused) == 3:
                leave.set()

    threads = [threading.Thread(target=enter, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(entered), len(refused), current()) == (1, 3, None)


def test_without_a_thread_that_watches_there_is_no_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start"), limit_memory("64GB", tmp_path):
            pass
    assert current() is None


@pytest.mark.parametrize("scratch", [5, b"/tmp", ["/tmp"], "a\0b"])
def test_what_is_not_a_folder(scratch: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"scratch"), limit_memory("64GB", scratch):
        pass


@pytest.mark.parametrize("change", [torch.conj, torch._neg_view], ids=["conjugate", "negative"])
def test_lazily_changed_buffers_keep_their_values(
    tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    model = nn.Module()
    model.register_buffer("table", change(torch.randn(128, 256, dtype=torch.complex64)))
    expected = model.table.clone()
    with limit_memory("64GB", tmp_path) as found:
        assert found is not None
        found.place_weights(model)
        assert found.scratch.holds(model.table)
        assert torch.equal(model.table, expected)
    assert torch.equal(model.table, expected)


def test_a_folder_in_memory_is_refused(tmp_path: Path) -> None:
    if not Path("/dev/shm").is_dir():
        pytest.skip("no file system in memory here")
    with pytest.raises(ConfigurationError, match="lies in memory"), limit_memory("64GB", "/dev/shm"):
        pass


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="cannot be made"), limit_memory("64GB", tmp_path / "file" / "x"):
        pass


def test_other_systems_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.sys, "platform", "darwin")
    assert sys.platform == "darwin"
    with pytest.raises(ConfigurationError, match="max_memory needs Linux"), limit_memory("64GB", tmp_path):
        pass


def _thorough(model: nn.Module) -> None:
    graph = fx.Graph()
    graph.output([graph.get_attr(name) for name, _ in model.named_parameters()])
    Fingerprint(fx.GraphModule(model, graph), thorough=True)


@pytest.mark.parametrize("read", [check_weights, weights_digest, whole_digest, _thorough])
def test_loops_that_read_all_weights_wait_for_memory(
    read: Callable[[nn.Module], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.Bound, "_watch", lambda self: None)  # As if it were never scheduled.
    model = nn.Module()
    save_file(
        {str(number): torch.zeros(4096, 1024) for number in range(24)}, tmp_path / "w.safetensors"
    )  # 16 MiB each.
    for name, weight in load_file(tmp_path / "w.safetensors").items():
        model.register_parameter(name, nn.Parameter(weight, requires_grad=False))
    with limit_memory(resident() + 150 * _MIB, tmp_path) as found:
        assert found is not None
        found.place_weights(model)
        read(model)
        found.relax()
        assert found.peak <= found.limit + 32 * _MIB
