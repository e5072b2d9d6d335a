"""What was learned is found again, and only where it belongs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fxquant.disk.finished_work import working_in
from fxquant.errors import ResumeWarning
from fxquant.numerics.weights import quantize_weight
from fxquant.reconstruction.store import Learned, Store, digest

FROM = {"options": "abc"}


def learned() -> Learned:
    weight = quantize_weight(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), bits=3, group_size=4)
    return Learned({"blocks.0.to_q": weight}, {"blocks.0.to_q": ([-1.0, -2.0], [3.0, 4.0])}, (0.5, 0.25))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with working_in(tmp_path / "new") as work:
        yield Store(work)


def test_it_comes_back_as_it_was(store: Store, tmp_path: Path) -> None:
    store.save("blocks.0", FROM, learned())
    found = Store(store.work).load("blocks.0", FROM)
    assert found is not None
    (own,), (other,) = found.codes.values(), learned().codes.values()
    assert all(torch.equal(getattr(own, part), getattr(other, part)) for part in ("packed", "scale", "zero_point"))
    assert (own.bits, own.group_size, own.in_features) == (3, 4, 8)
    assert (found.ranges, found.errors) == (learned().ranges, learned().errors)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["blocks.0.safetensors"]


def test_that_of_another_run_is_not_used(store: Store) -> None:
    store.save("blocks.0", FROM, learned())
    assert store.load("blocks.1", FROM) is None
    with pytest.warns(ResumeWarning, match="differs in options"):
        assert store.load("blocks.0", {"options": "abd"}) is None


def test_a_damaged_file_is_not_used(store: Store, tmp_path: Path) -> None:
    store.save("blocks.0", FROM, learned())
    path = tmp_path / "new" / "blocks.0.safetensors"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.warns(ResumeWarning, match="computed anew"):
        assert store.load("blocks.0", FROM) is None


def test_without_a_folder_nothing_is_kept() -> None:
    store = Store(None)
    store.save("blocks.0", FROM, learned())
    assert store.load("blocks.0", FROM) is None


def test_fingerprints_tell_texts_values_and_shapes_apart() -> None:
    x = torch.arange(6.0)
    every = [digest("a", [x]), digest("b", [x]), digest("a", [x + 1]), digest("a", [x.reshape(2, 3)]), digest("a", [])]
    assert len(set(every)) == len(every)
    assert digest("a", [x.clone()]) == every[0]
