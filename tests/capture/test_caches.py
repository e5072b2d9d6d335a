"""A cache that a call filled is empty again where the model is traced, if the call fills it again to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

import fxquant
from fxquant.errors import CheckpointError


def table(size: int) -> Tensor:
    return torch.linspace(-1, 1, size * 8).reshape(size, 8).sin()


class Maker:
    def __init__(self) -> None:
        self.rows: dict[int, Tensor] = {}

    def __call__(self, size: int) -> Tensor:
        if size not in self.rows:
            self.rows[size] = table(size)
        return self.rows[size]


class Cached(diffusers.ModelMixin, diffusers.ConfigMixin):
    """A model that fills caches of several kinds at its calls."""

    @register_to_config
    def __init__(self, way: str = "once") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(8, 8)
        self.rows: Any = None
        self.size = 0
        self.factor = 1.0
        self.by_size: dict[int, tuple[Tensor, ...]] = {}
        self.maker: Any = None
        self.makers = [Maker()]

    def once(self, size: int) -> Tensor:
        if self.rows is None:
            self.rows = table(64)
        return self.rows[:size]

    def last(self, size: int) -> Tensor:
        if self.size != size:
            self.rows, self.size = [table(size)], size
        return self.rows[0]

    def every(self, size: int) -> Tensor:
        if size not in self.by_size:
            self.by_size[size] = (table(size), table(size).neg())
        return self.by_size[size][0] - self.by_size[size][1]

    def added(self, size: int) -> Tensor:
        if not hasattr(self, "_added"):
            self._added = {"rows": table(64)}
        return self._added["rows"][:size]

    def lazily(self, size: int) -> Tensor:
        if self.maker is None:
            self.maker = Maker()
        return self.maker(size)

    def held(self, size: int) -> Tensor:
        return self.makers[0](size)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.proj(x) * self.factor + getattr(self, self.config.way)(x.shape[1]) + timestep[:, None, None]


WAYS = ["once", "last", "every", "added", "lazily", "held"]


def call(tokens: int = 3, batch: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, tokens, 8, generator=torch.Generator().manual_seed(tokens)), torch.arange(1.0, batch + 1)


def compiled(model: nn.Module, *tokens: int) -> fxquant.GraphModel:
    def calibrate() -> None:
        for number in tokens:
            model(*call(number))

    return fxquant.compile(model, recipe="rtn-w8a8", layers="all", calibrate=calibrate, measure=0)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("called", "sizes", "further"),
    [
        ((3,), (3,), (4,)),
        *(pytest.param(called, (3, 4), (6, 7), marks=pytest.mark.exhaustive) for called in ((3,), (5, 7), (3, 4))),
    ],
    ids=str,
)
def test_a_model_that_was_called_is_saved_and_loaded(
    way: str, called: tuple[int, ...], sizes: tuple[int, ...], further: tuple[int, ...], tmp_path: Path
) -> None:
    """Called with some sizes, calibrated with others, and then called with further ones."""
    model, other = Cached(way).eval(), Cached(way).eval()
    with torch.no_grad():
        for tokens in called:
            model(*call(tokens))
        kept = vars(model).copy()
        quantized, expected = compiled(model, *sizes), compiled(other, *sizes)
        fxquant.save(quantized, tmp_path / "model")
        loaded = fxquant.load(tmp_path / "model", model=Cached)
        for made in (call(3), *(call(size, 5) for size in sizes), *map(call, further)):
            assert torch.equal(quantized(*made), expected(*made))
            assert torch.equal(quantized(*made), loaded(*made))
    assert all(vars(model)[key] is value for key, value in kept.items())


def scaled(model: Any) -> None:
    model.rows = model.rows * 2


def factored(model: Any) -> None:
    model.factor = 3.0


@pytest.mark.parametrize(("change", "said"), [(scaled, "was changed"), (factored, "was changed")])
def test_what_no_call_makes_stays(change: Callable[[Any], None], said: str, tmp_path: Path) -> None:
    """The graph has what the model has, and the class does not give it."""
    model = Cached().eval()
    with torch.no_grad():
        model(*call())
        change(model)
        quantized = compiled(model, 3)
        torch.testing.assert_close(quantized(*call()), model(*call()), rtol=0.05, atol=0.05)
        with pytest.raises(CheckpointError, match=said):
            fxquant.save(quantized, tmp_path / "model")


@pytest.mark.parametrize("way", ["once", "last"])
def test_a_plan_is_replayed_on_a_model_that_was_called(way: str, tmp_path: Path) -> None:
    first, model = Cached(way).eval(), Cached(way).eval()
    with torch.no_grad():
        made = compiled(first, 3)
        model(*call(5))
        model(*call(3))
        again = fxquant.compile(model, plan=made.plan)
        assert torch.equal(again(*call()), made(*call()))
        fxquant.save(again, tmp_path / "model")
        assert torch.equal(fxquant.load(tmp_path / "model", model=Cached)(*call(6)), made(*call(6)))
