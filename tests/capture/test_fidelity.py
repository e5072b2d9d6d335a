from __future__ import annotations

import functools
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import fxquant
from fxquant.capture.trace import Architecture
from fxquant.errors import CaptureError

Forward = Callable[["Model", Tensor, Tensor], Tensor]


class Processor:
    """A plain object with an attribute, as diffusers' attention processors are."""

    def __init__(self) -> None:
        self.seen: Any = 0


class Model(nn.Module):
    """Its code is given as a function; notes the calls that it gets with values."""

    limit: Any = None

    def __init__(self, way: Forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.into, self.out = nn.Linear(4, 8), nn.Linear(8, 4)
        self.processor = Processor()
        self.last = torch.zeros(3, 4)
        self.tables: dict[int, Tensor | None] = {}
        self.counts: Any = np.zeros(2)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        if not isinstance(x, FakeTensor):
            CALLS.append(type(self))
        return self.way(self, x, timestep)

    def run(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.out(F.gelu(self.into(x) + timestep[:, None, None] / 1000))


CALLS: list[type] = []


def call(seed: int = 0, tokens: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, tokens, 4, generator=generator), torch.tensor([900 - 100 * seed, 500])


def every_other(model: Model, x: Tensor, timestep: Tensor) -> Tensor:
    model.limit = (model.limit or 0) + 1
    return x if model.limit % 2 == 0 else model.run(x, timestep)


def far_apart(model: Model, x: Tensor, timestep: Tensor) -> Tensor:
    model.processor.seen += 1
    return x if model.processor.seen % 10 == 0 else model.run(x, timestep)


def residual(model: Model, x: Tensor, timestep: Tensor) -> Tensor:
    y = model.run(x, timestep) + model.last
    model.last = y[0].detach()
    return y


def in_numpy(model: Model, x: Tensor, timestep: Tensor) -> Tensor:
    model.counts[0] += 1
    return model.run(x, timestep) * float(model.counts[0])


def history(model: Model, x: Tensor, timestep: Tensor) -> Tensor:
    model.tables[len(model.tables)] = None
    return model.run(x, timestep) * len(model.tables)


@pytest.mark.parametrize(
    ("way", "said"),
    [
        (every_other, "'limit'"),
        (far_apart, "'processor'"),
        (residual, "'last'"),
        (history, "'tables'"),
        (in_numpy, "'counts'"),
    ],
)
def test_state_between_calls_is_refused(way: Forward, said: str) -> None:
    model = Model(way).eval()
    expected = [model(*call(seed)) for seed in range(3)]
    model = Model(way).eval()
    for function in (
        lambda: fxquant.trace(model)(*call()),
        lambda: fxquant.compile(model, recipe="rtn-w8a8", layers="all", calibrate=lambda: model(*call())),
    ):
        with pytest.raises(CaptureError) as error:
            function()
        assert "Model keeps state between calls" in str(error.value)
        assert said.strip("'") in str(error.value)
    assert all(torch.equal(model(*call(seed)), right) for seed, right in enumerate(expected)), "the model was run"


def filled_once(model: Model, x: Tensor, timestep: Tensor) -> Tensor:
    if model.limit is None:
        model.limit = x.shape[1]
    return model.run(x, timestep) * model.limit


def by_size(model: Model, x: Tensor, timestep: Tensor) -> Tensor:
    model.processor.seen = x.shape[1]
    return model.run(x, timestep) * model.processor.seen


def device_of(model: Model, x: Tensor, timestep: Tensor) -> Tensor:
    model.processor.seen = torch.device(str(model.processor.seen or "cpu"))  # Another object each time, equal.
    return model.run(x, timestep).to(model.processor.seen)


def handed_on(model: Model, x: Tensor, timestep: Tensor) -> Tensor:
    model.limit = random.random()  # Others each time, and written before it is read.
    return model.run(x, timestep) + 0 * model.limit


@pytest.mark.parametrize(
    ("way", "calls"), [(Model.run, 2), (filled_once, 3), (by_size, 3), (device_of, 3), (handed_on, 3)]
)
def test_attributes_that_no_call_inherits_are_no_state(way: Forward, calls: int) -> None:
    model = Model(way).eval()
    traced = fxquant.trace(model)
    CALLS.clear()
    outputs = [traced(*call(seed)) for seed in range(3)]
    assert len(CALLS) == calls
    assert all(torch.equal(output, model(*call(seed))) for seed, output in enumerate(outputs))


NUMBERS = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]


@pytest.mark.parametrize(
    "way",
    [
        lambda model, x, timestep: model.run(x, timestep) * random.random(),
        lambda model, x, timestep: model.run(x, timestep) * NUMBERS.pop(),
        lambda model, x, timestep: model.run(x, timestep) * (2.0 if isinstance(x, FakeTensor) else 3.0),
        lambda model, x, timestep: model.run(x, timestep) / (1 if torch.compiler.is_exporting() else 0),
    ],
)
def test_what_a_graph_cannot_see_is_found(way: Forward) -> None:
    model = Model(way).eval()
    with pytest.raises(CaptureError, match=r"graph of Model does not compute what the model .*: .* output 0 is off by"):
        fxquant.trace(model)(*call())
    with pytest.raises(CaptureError, match="does not compute what the model computes"):
        fxquant.compile(model, recipe="rtn-w8a8", layers="all", calibrate=lambda: model(*call()))


def test_noise_is_drawn_as_the_model_draws_it() -> None:
    model = Model(lambda model, x, timestep: model.run(x + torch.randn_like(x), timestep)).eval()
    traced = fxquant.trace(model)
    for seed in range(2):
        torch.manual_seed(seed)
        expected = model(*call(seed))
        torch.manual_seed(seed)
        assert torch.equal(traced(*call(seed)), expected)
    torch.manual_seed(0)
    expected = torch.rand(())
    torch.manual_seed(0)
    fxquant.trace(model)(*call())  # Draws as often as one call of the model does: the comparison draws nothing.
    model(*call())
    torch.manual_seed(0)
    model(*call())
    torch.manual_seed(0)
    assert torch.equal(torch.rand(()), expected)


@pytest.mark.parametrize("noisy", [False, True])
def test_other_threads_draw_as_if_nothing_were_compared(noisy: bool) -> None:
    """What they draw while a copy of the model runs is neither made from its seed nor repeated afterwards."""
    drawn: list[Tensor] = []

    def run(model: Model, x: Tensor, timestep: Tensor) -> Tensor:
        if not torch.compiler.is_exporting():
            other = threading.Thread(target=lambda: drawn.append(torch.rand(())))
            other.start()
            other.join()
        return model.run(x + torch.randn_like(x) if noisy else x, timestep)

    traced, made = fxquant.trace(Model(run).eval()), call()
    torch.manual_seed(3)
    traced(*made)  # Draws at its own end, where it is noisy.
    torch.manual_seed(3)
    assert len(drawn) > 1
    assert torch.equal(torch.stack(drawn), torch.stack([torch.rand(()) for _ in drawn]))


def test_no_generator_is_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """That would seed the generators of all GPUs."""
    model, made = Model(lambda model, x, timestep: model.run(x + torch.randn_like(x), timestep)).eval(), call()
    monkeypatch.setattr(torch, "manual_seed", None)
    fxquant.trace(model)(*made)


def test_noise_that_a_graph_draws_otherwise_is_named() -> None:
    def drawn(model: Model, x: Tensor, timestep: Tensor) -> Tensor:
        if not torch.compiler.is_exporting():
            torch.rand(1)
        return model.run(x + torch.randn_like(x), timestep)

    with pytest.raises(CaptureError, match=r"draws random numbers \(aten.randn_like.default\)"):
        fxquant.trace(Model(drawn).eval())(*call())


def test_an_attention_that_drops_out_nothing_draws_nothing() -> None:
    """Its op is one that may draw; a graph with it that is untrue for another reason is not said to draw."""

    def other(model: Model, x: Tensor, timestep: Tensor) -> Tensor:
        y = model.run(F.scaled_dot_product_attention(x, x, x), timestep)
        return y if torch.compiler.is_exporting() else 2 * y

    with pytest.raises(CaptureError, match="does not compute what the model computes"):
        fxquant.trace(Model(other).eval())(*call())


def test_inputs_that_the_model_refuses_are_not_tried() -> None:
    """It takes one timestep alone; the graph is compared on the inputs of the call."""

    def strict(model: Model, x: Tensor, timestep: Tensor) -> Tensor:
        if not isinstance(x, FakeTensor) and timestep[0] != 900:
            raise ValueError("no such step")
        return model.run(x, timestep)

    model = Model(strict).eval()
    assert torch.equal(fxquant.trace(model)(*call()), model(*call()))


def test_a_model_that_was_moved_since_is_not_compared() -> None:
    model = Model(Model.run).eval()
    traced = fxquant.trace(model)
    expected = traced(*call())
    model.double()
    CALLS.clear()
    assert torch.equal(traced(*call()), expected)
    assert traced(*call(tokens=5)).dtype == torch.float32
    assert not CALLS


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = Model(lambda model, x, timestep: model.run(x, timestep.to(x.dtype))).eval().to(dtype)
    x, timestep = call()
    with torch.no_grad():
        assert torch.equal(fxquant.trace(model)(x.to(dtype), timestep), model(x.to(dtype), timestep))


@functools.lru_cache
def table(length: int) -> Tensor:
    return torch.linspace(-1, 1, length * 4).reshape(length, 4).sin()


def test_a_table_in_a_cache_of_a_function_is_filled_with_tensors() -> None:
    """Tracing would leave a fake tensor in it, which the float model would get for good."""

    def cached(model: Model, x: Tensor, timestep: Tensor) -> Tensor:
        return model.run(x + table(x.shape[1]), timestep)

    table.cache_clear()
    model = Model(cached).eval()
    traced = fxquant.trace(model)
    with torch.no_grad():
        assert torch.equal(traced(*call()), model(*call()))
    assert type(table(call()[0].shape[1])) is Tensor


TABLES: dict[int, Tensor] = {}


def test_a_table_that_only_a_trace_filled_is_named() -> None:
    def cached(model: Model, x: Tensor, timestep: Tensor) -> Tensor:
        length = x.shape[1]
        if length not in TABLES:
            TABLES[length] = table.__wrapped__(length)
        return model.run(x + TABLES[length], timestep)

    TABLES.clear()
    architecture = Architecture.of(Model(cached).eval(), "timestep")
    architecture.capture(architecture.canonical(call(), {}))
    with pytest.raises(CaptureError, match=r"reads a table that its code keeps outside of the model.*Empty it"):
        architecture.capture(architecture.canonical(call(), {}))
    TABLES.clear()
