"""Sources of graphs that are gone are freed; those of living ones stay."""

from __future__ import annotations

import gc
import inspect
import linecache

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx import graph_module

from fxquant.ir import sources
from fxquant.ir.sources import forget_sources


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def sources_of_torch() -> dict[str, str]:
    return graph_module._loader.eval_cache  # type: ignore[attr-defined]


def test_only_living_graphs_keep_their_source(monkeypatch: pytest.MonkeyPatch) -> None:
    living = fx.symbolic_trace(Twice())
    names = [living.forward.__code__.co_filename]
    for _ in range(3):
        gone = fx.symbolic_trace(Twice())
        gone.recompile()
        names.append(gone.forward.__code__.co_filename)
        linecache.getlines(names[-1])
    del gone
    gc.collect()
    monkeypatch.setattr(sources, "EVERY", 0)
    monkeypatch.setattr(sources._sources, "_kept", 0)
    forget_sources()
    assert [name in sources_of_torch() for name in names] == [True, False, False, False]
    assert not any(name in linecache.cache for name in names[1:])
    assert "return mul" in inspect.getsource(living.forward)
    assert torch.equal(living(torch.ones(2)), torch.full((2,), 2.0))
    assert len(sources_of_torch()) == sources._sources._kept


def test_they_are_looked_for_once_in_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "EVERY", 3)
    monkeypatch.setattr(sources._sources, "_kept", len(sources_of_torch()))
    before = len(sources_of_torch())
    for number in range(3):
        forget_sources()
        assert len(sources_of_torch()) == before + number
        fx.symbolic_trace(Twice())
    gc.collect()
    forget_sources()
    assert len(sources_of_torch()) <= before
