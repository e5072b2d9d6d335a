"""What was learned is found again, and only where it belongs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fxquant.numerics.weights import quantize_weight
from fxquant.reconstruction.store import Learned, Store, digest


def learned() -> Learned:
    weight = quantize_weight(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), bits=3, group_size=4)
    return Learned({"blocks.0.to_q": weight}, {"blocks.0.to_q": ([-1.0, -2.0], [3.0, 4.0])}, (0.5, 0.25))


def test_it_comes_back_as_it_was(tmp_path: Path) -> None:
    Store(tmp_path / "new").save("blocks.0", "abc", learned())
    found = Store(tmp_path / "new").load("blocks.0", "abc")
    assert found is not None
    (own,), (other,) = found.codes.values(), learned().codes.values()
    assert all(torch.equal(getattr(own, part), getattr(other, part)) for part in ("packed", "scale", "zero_point"))
    assert (own.bits, own.group_size, own.in_features) == (3, 4, 8)
    assert (found.ranges, found.errors) == (learned().ranges, learned().errors)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["blocks.0.safetensors"]


def test_that_of_another_run_is_ignored(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save("blocks.0", "abc", learned())
    assert store.load("blocks.0", "abd") is None
    assert store.load("blocks.1", "abc") is None


def test_a_damaged_file_is_ignored_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(tmp_path)
    store.save("blocks.0", "abc", learned())
    path = tmp_path / "blocks.0.safetensors"
    path.write_bytes(path.read_bytes()[:-20])
    assert store.load("blocks.0", "abc") is None
    assert "learned anew" in caplog.text


def test_without_a_folder_nothing_is_kept() -> None:
    store = Store(None)
    store.save("blocks.0", "abc", learned())
    assert store.load("blocks.0", "abc") is None


def test_fingerprints_tell_texts_values_and_shapes_apart() -> None:
    x = torch.arange(6.0)
    every = [digest("a", [x]), digest("b", [x]), digest("a", [x + 1]), digest("a", [x.reshape(2, 3)]), digest("a", [])]
    assert len(set(every)) == len(every)
    assert digest("a", [x.clone()]) == every[0]
