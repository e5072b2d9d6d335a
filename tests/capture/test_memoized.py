"""A table in a cache of a function is computed in the graph, and the cache holds no tensors of a trace afterwards."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fxquant
from fxquant.capture.memoized import Memos
from fxquant.capture.trace import Architecture
from tests.traces import ALL_MEMOS, memos

ROOT = Path(__file__).resolve().parents[2]


@functools.lru_cache
def bounded(size: int) -> Tensor:
    return torch.linspace(-1, 1, size * 8).reshape(size, 8).sin()


@functools.cache
def unbounded(size: int) -> dict[str, list[Tensor]]:
    return {"rows": [torch.linspace(-1, 1, size * 8).reshape(size, 8).cos()]}


@functools.cache
def by_values(size: int) -> Tensor:
    """Made from values, which a trace has not."""
    return torch.tensor([[value * 0.5 for value in range(8)]] * int(torch.ones(size).sum().item()))


class Cached(diffusers.ModelMixin, diffusers.ConfigMixin):
    """A model that reads tables which functions keep."""

    @register_to_config
    def __init__(self, from_values: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        size = x.shape[1]
        table = by_values(size) if self.config.from_values else bounded(size) + unbounded(size)["rows"][0]
        return self.proj(x) + table + timestep[:, None, None]


def call(tokens: int = 3, batch: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, tokens, 8, generator=torch.Generator().manual_seed(tokens)), torch.arange(1.0, batch + 1)


def compiled(model: nn.Module) -> fxquant.GraphModel:
    return fxquant.compile(model, recipe="rtn-w8a8", layers="all", calibrate=lambda: model(*call()), measure=0)


@pytest.fixture(autouse=True)
def empty() -> Iterator[None]:
    for function in (bounded, unbounded, by_values):
        function.cache_clear()
    with memos(ALL_MEMOS):
        yield
    for function in (bounded, unbounded, by_values):
        function.cache_clear()


@pytest.mark.slow
@torch.no_grad()
def test_a_new_size_after_compilation_leaves_the_float_model_as_it_was() -> None:
    model, untouched = Cached().eval(), Cached().eval()
    quantized = compiled(model)
    for made in (call(5), call(7, 1), call(3, 4), call(5)):
        found = quantized(*made)
        expected = untouched(*made)
        assert type(expected) is Tensor
        torch.testing.assert_close(found, expected, rtol=0, atol=0.5)  # Ranges are those of the first call.


@torch.no_grad()
@pytest.mark.parametrize("full", [False, True])
def test_a_graph_is_the_same_whether_caches_are_full(full: bool) -> None:
    model = Cached().eval()
    if full:
        model(*call())
    architecture = Architecture.of(model, "timestep")
    code = architecture.capture(architecture.canonical(call(), {})).code
    assert any("linspace" in line for line in code)
    assert not bounded.cache_info().currsize
    assert architecture.capture(architecture.canonical(call(), {})).code == code


_OTHER_PROCESS = """
import sys, torch, fxquant
from tests.capture.test_memoized import Cached, call
torch.save([fxquant.load(sys.argv[1], model=Cached)(*call(size)) for size in (3, 5)], sys.argv[2])
"""


@pytest.mark.slow
@torch.no_grad()
def test_a_new_process_gives_the_same_bits(tmp_path: Path) -> None:
    model = Cached().eval()
    model(*call())
    quantized = compiled(model)
    fxquant.save(quantized, tmp_path / "model")
    command = [sys.executable, "-W", "error::fxquant.errors.QualityWarning", "-c", _OTHER_PROCESS]
    subprocess.run([*command, str(tmp_path / "model"), str(tmp_path / "found")], check=True, cwd=ROOT)
    for size, found in zip((3, 5), torch.load(tmp_path / "found"), strict=True):
        assert torch.equal(found, quantized(*call(size)))


@torch.no_grad()
def test_tables_made_from_values_are_constants() -> None:
    model = Cached(from_values=True).eval()
    traced = fxquant.trace(model)
    for made in (call(), call(5)):
        assert torch.equal(traced(*made), model(*made))


class Tables:
    """Has a cache of a static method."""

    @staticmethod
    @functools.cache
    def ones(size: int) -> Tensor:
        return torch.ones(size)


def test_only_what_holds_tensors_of_a_trace_is_emptied() -> None:
    kept: Any = Tables.ones
    kept(3)
    memos = Memos()
    assert not memos.read()
    kept(3)
    assert memos.read() == [kept]
    memos.forget_traced()
    assert kept.cache_info().currsize == 1
    memos = Memos()
    with FakeTensorMode():
        bounded(3)
        bounded(3)
    assert not memos.read()  # Filled and read in one trace, as by each block of a model.
    memos.forget_traced()
    assert not bounded.cache_info().currsize
