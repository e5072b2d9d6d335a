"""Python numbers as inputs: one graph for all of them where the model computes with them, one for each where not."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.api import trace
from fxquant.capture.calls import CallSpec
from fxquant.errors import SpeedWarning
from fxquant.runtime.model import GraphModel

Body = Callable[[Tensor, Any, Tensor], Any]


class Numbered(nn.Module):
    """Two linears, and between them whatever a body makes of a value, a number and integers."""

    def __init__(self, body: Body, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])])
        self.body = body
        self.to(dtype).eval().requires_grad_(False)

    def forward(self, x: Tensor, timestep: Tensor, number: Any = 1.0) -> Tensor:
        first, second = self.blocks[0]
        counts = torch.arange(x.shape[1], device=x.device)
        return second(self.body(first(x), number, counts) * torch.ones((), dtype=x.dtype)) + timestep[:, None, None]


def call(batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, 4, generator=generator).to(dtype)
    return {"x": x, "timestep": torch.full((batch,), 0.5, dtype=dtype)}


def optional(x: Tensor, s: Any, counts: Tensor) -> Tensor:
    assert isinstance(s, float)
    assert not torch.is_tensor(s)
    return x * s


COMPUTING: dict[str, Body] = {
    "times": lambda x, s, n: x * s + s * x,
    "plus": lambda x, s, n: (s + x) - (s - x) + (x - s) * 3,
    "divided": lambda x, s, n: x / s + s / (x * x + 2),
    "power": lambda x, s, n: x.abs() ** s + s**x,
    "python first": lambda x, s, n: x * ((1 - s) / 2 + s**2 - 2.0**s + abs(-s) + s // 0.3 + (5 * s) % 0.7),
    "integers": lambda x, s, n: x + (n * s)[:, None].to(x) + (n > s)[:, None],
    "single numbers": lambda x, s, n: x * (torch.tensor(2.0, dtype=x.dtype) * s),
    "where": lambda x, s, n: torch.where(x > s, x, s).clamp(max=2 * s),
    "filled": lambda x, s, n: x + torch.full((4,), s).to(x) + torch.full_like(x, s) * x.new_full((4,), fill_value=s),
    "made": lambda x, s, n: x + torch.tensor([s, 2.0, 1 - s, 3], dtype=x.dtype) + torch.tensor(s).to(x),
    "a list": lambda x, s, n: x * sum(s * weight for weight in (0.5, 1.0)),
    "in place": lambda x, s, n: x.clone().mul_(s).add_(s).masked_fill(x > 0, s),
    "is a float": optional,
    "ignored": lambda x, s, n: x,
}
DECIDING: dict[str, Body] = {
    "compared": lambda x, s, n: x * 2 if s > 0.5 else x,
    "and used": lambda x, s, n: x * s if s else x,
    "counted": lambda x, s, n: x * int(s * 10),
    "rounded": lambda x, s, n: x * round(s, 1) + math.floor(s * 10) + math.sqrt(s),
    "printed": lambda x, s, n: x * len(f"{s:.3f}"),
    "a key": lambda x, s, n: x * {0.25: 3.0}.get(s, 1.0),
    "a slice": lambda x, s, n: x * x[..., : int(1 + 3 * s)].sum(),
    "a scalar of an op": lambda x, s, n: torch.add(x, x, alpha=s) + nn.functional.leaky_relu(x, s),
    "asked": lambda x, s, n: x * (2 if s.is_integer() else 3),
    "a numpy product": lambda x, s, n: x * torch.from_numpy(n.numpy() * s)[:, None].to(x),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in COMPUTING),
        *((name, dtype) for name in ("times", "single numbers") for dtype in (torch.float64, torch.bfloat16)),
    ],
    ids=str,
)
def test_one_graph_serves_all_numbers(name: str, dtype: torch.dtype) -> None:
    model = Numbered(COMPUTING[name], dtype)
    traced = trace(model)
    for number in (0.25, 0.75, 1.0, 1e-3):
        for batch in (2, 3):
            made = call(batch, dtype=dtype)
            found, expected = traced(**made, number=number), model(**made, number=number)
            assert found.dtype == expected.dtype
            torch.testing.assert_close(found, expected, rtol=1e-6 if dtype != torch.bfloat16 else 1e-2, atol=1e-6)
    assert len(traced.graphs) == 1
    assert traced.captured[0].static_batch is None
    assert traced.captured[0].call.numbers == ["number"]


@pytest.mark.parametrize("body", DECIDING.values(), ids=DECIDING)
def test_what_the_code_decides_by_is_held(body: Body) -> None:
    model = Numbered(body)
    traced = trace(model)
    for number in (0.25, 0.75, 0.25, 1.0):
        for batch in (2, 3):
            made = call(batch)
            torch.testing.assert_close(traced(**made, number=number), model(**made, number=number))
    assert len(traced.graphs) == 3


class Optioned(nn.Module):
    """A model with numbers in a dict of options, of which it asks one what it is and ignores another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])])
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor, timestep: Tensor, options: dict[str, Any] | None = None) -> Tensor:
        first, second = self.blocks[0]
        options = options or {}
        x = first(x) * options.get("strength", 1.0)
        if options.get("guidance", 0.0) > 1:
            x = x * 2
        scales = options.get("scales", [1.0])
        return second(x * sum(scales)) / len(scales) + timestep[:, None, None]


def options(step: int) -> dict[str, Any]:
    part = step % 7 / 10
    return {"step": step, "strength": 1 - part, "guidance": 0.5, "scales": [2 * part, 0.5]}


def steps() -> list[dict[str, Any]]:
    return [call(seed=step) | {"options": options(step)} for step in range(6)]


@pytest.fixture(scope="module")
def quantized() -> GraphModel:
    model = Optioned()
    return fxquant.compile(model, recipe="ptq4dit-w8a8", calibrate=lambda: [model(**made) for made in steps()])


def test_options_that_change_with_the_step_share_graphs(quantized: GraphModel) -> None:
    assert len(quantized.graphs) == 2  # The first one is for one step: integers name and count things as a rule.
    held = quantized.captured[1].call.known_numbers
    assert held == {"options.guidance": 0.5}
    model = Optioned()
    for made in (*steps(), call(3) | {"options": options(17)}):
        torch.testing.assert_close(quantized(**made), model(**made), rtol=0.1, atol=0.1)
    assert len(quantized.graphs) == 2
    assert min(quantized.plan.output_sqnr_db.values()) > 35


def test_they_are_saved_and_loaded(quantized: GraphModel, tmp_path: Path) -> None:
    fxquant.save(quantized, tmp_path / "q")
    loaded = fxquant.load(tmp_path / "q", model=Optioned())
    assert [captured.call for captured in loaded.captured] == [captured.call for captured in quantized.captured]
    for made in (*steps(), call(3) | {"options": options(17)}):
        assert torch.equal(loaded(**made), quantized(**made))
    assert len(loaded.graphs) == 2
    again = fxquant.compile(Optioned(), plan=quantized.plan)
    made = call(3) | {"options": options(8)}
    assert torch.equal(again(**made), quantized(**made))


def test_compiled_they_are_inputs(quantized: GraphModel) -> None:
    torch._dynamo.reset()
    seen: list[int] = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Any:
        seen.append(1)
        return module.forward

    compiled = torch.compile(quantized, fullgraph=True, backend=backend)
    for made in steps()[1:]:
        assert torch.equal(compiled(**made), quantized(**made))
    assert len(seen) == 1


@pytest.mark.slow
def test_compiled_within_something_larger(quantized: GraphModel) -> None:
    torch._dynamo.reset()
    model = Numbered(COMPUTING["times"])
    traced = trace(model)
    made = call()
    traced(**made, number=0.5)
    compiled = torch.compile(lambda number: traced(**made, number=number) + 1, fullgraph=True, backend="aot_eager")
    for number in (0.5, 0.25, 0.75):
        torch.testing.assert_close(compiled(number), model(**made, number=number) + 1)
    assert len(traced.graphs) == 1


@pytest.mark.exhaustive  # One run of the C++ compiler.
def test_a_package_takes_them(tmp_path: Path) -> None:
    model = Numbered(COMPUTING["times"])
    quantized = fxquant.compile(
        model, recipe="rtn-w8a8", calibrate=lambda: [model(**call(seed=n), number=1 - n / 5) for n in range(3)]
    )
    fxquant.export_aot(quantized, tmp_path / "package")
    packaged = fxquant.load_package(tmp_path / "package")
    for number in (1.0, 0.3, -2.0):
        expected = quantized(**call(3), number=number)
        torch.testing.assert_close(packaged(**call(3), number=number), expected)


def test_a_number_that_only_python_takes_is_a_constant_and_others_stay_open() -> None:
    class Pair(Numbered):
        def forward(self, x: Tensor, timestep: Tensor, first: float, second: float) -> Tensor:
            if type(first) is not float:
                raise TypeError(f"{first} is no float")
            return super().forward(x * second, timestep, first)

    model = Pair(COMPUTING["times"])
    traced = trace(model)
    for first, second in ((0.5, 0.1), (0.5, 0.2), (0.25, 0.3), (0.25, 0.4)):
        torch.testing.assert_close(
            traced(**call(), first=first, second=second), model(**call(), first=first, second=second)
        )
    assert [graph.call.numbers for graph in traced.captured] == [["second"]] * 2


def test_a_model_that_fails_with_any_number_says_so_once() -> None:
    def failing(x: Tensor, s: Any, counts: Tensor) -> Tensor:
        return x if x.sum() > s else -x

    with pytest.raises(fxquant.errors.CaptureError, match=r"return x if x\.sum"):
        trace(Numbered(failing))(**call(), number=0.5)


FLOATS, STRINGS = [n / 10 for n in range(10)], list("abcdefghij")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "compiling"),
    [
        pytest.param(FLOATS, False, id="floats-at calls"),
        pytest.param(STRINGS, True, id="strings-at calibration"),
        pytest.param(FLOATS, True, id="floats-at calibration", marks=pytest.mark.exhaustive),
        pytest.param(STRINGS, False, id="strings-at calls", marks=pytest.mark.exhaustive),
    ],
)
def test_a_graph_for_each_value_is_told_once(values: list[Any], compiling: bool) -> None:
    model = Numbered(lambda x, s, n: x * {0.1: 3.0, "b": 3.0}.get(s, 1.0))

    def run(target: nn.Module = model) -> None:
        for value in values:
            target(**call(), number=value)

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if compiling:
            fxquant.compile(model, recipe="rtn-w8a8", calibrate=run, measure=0)
        else:
            run(trace(model))
    said = [str(warning.message) for warning in told if warning.category is SpeedWarning]
    assert len(said) == 1
    assert (
        f"8 graphs were captured for calls that differ in constants alone, the last for number={values[7]!r}" in said[0]
    )


def test_a_spec_that_leaves_a_number_open_serves_no_code_that_asks_for_it() -> None:
    model = Numbered(DECIDING["compared"])
    open_number = CallSpec.from_json(trace_call(Numbered(COMPUTING["times"])).to_json())
    architecture = fxquant.capture.trace.Architecture.of(model, "timestep")
    with pytest.raises(fxquant.errors.CaptureError, match="branches on a number that is to be an input"):
        architecture.capture_spec(open_number, torch.device("cpu"))


def trace_call(model: nn.Module) -> CallSpec:
    traced = trace(model)
    traced(**call(), number=0.5)
    return traced.captured[0].call
