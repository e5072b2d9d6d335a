"""What lets tests share traces tells models apart by all that a trace depends on."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fxquant.capture.graph import CapturedGraph
from fxquant.capture.trace import Architecture
from fxquant.errors import CaptureError
from fxquant.ir.tensors import read_tensors
from tests.tiny import inputs, make_dit
from tests.traces import traced_anew, traced_once
from tests.zoo.models import ENTRIES


class Power:
    """An object with a method, and with an attribute that the method reads."""

    def __init__(self, exponent: int) -> None:
        self.exponent = exponent

    def of(self, x: Tensor) -> Tensor:
        return x**self.exponent


class Listed:
    """An object that keeps a number or another such object in containers."""

    def __init__(self, held: Any) -> None:
        self.held = {"all": [(held,)]}

    def of(self, x: Tensor) -> Tensor:
        ((held,),) = self.held["all"]
        return held.of(x) if isinstance(held, Listed) else x * held


class Model(nn.Module):
    def __init__(self, body: Callable[[Tensor], Tensor], factor: Any = 1.0) -> None:
        super().__init__()
        self.body, self.factor = body, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.factor


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The specs of calls that are really traced."""
    made, export = [], Architecture._export

    def counted(self: Architecture, call: Any, *others: Any) -> Any:
        made.append(call)
        return export(self, call, *others)

    monkeypatch.setattr(Architecture, "_export", counted)
    return made


def captured(model: nn.Module, *inputs: Tensor) -> CapturedGraph:
    architecture = Architecture.of(model.eval(), None)
    with traced_once():
        return architecture.capture(architecture.canonical(inputs, {}))


def test_equal_models_are_traced_once_and_have_graphs_of_their_own(traces: list[Any]) -> None:
    x = torch.randn(2, 3)
    first, second = (captured(Model(Power(3).of), x) for _ in range(2))
    assert len(traces) == 1
    assert first.code == second.code
    assert first.module is not second.module
    captured(Model(Power(3).of), torch.randn(2, 5))
    assert len(traces) == 2


def test_a_model_that_is_built_from_its_config_shares_the_trace_and_no_values(traces: list[Any]) -> None:
    """Whatever it reads must be in the checkpoint, so its buffers have no values."""
    model = make_dit()
    architecture = Architecture.of(model, "timestep")
    built = Architecture.from_config(type(model), json.loads(json.dumps(dict(model.config))), "timestep")
    built.skeleton.register_to_config(_name_or_path="somewhere")
    with traced_once():
        first = architecture.capture(architecture.canonical((), inputs()))
        second = built.capture_spec(first.call, torch.device("cpu"))
        third = architecture.capture_spec(first.call, torch.device("cpu"))
    assert len(traces) == 1
    name, table = next(model.named_buffers())
    assert all(torch.equal(read_tensors(captured.module)[name], table) for captured in (first, third))
    assert all(isinstance(tensor, FakeTensor) for tensor in read_tensors(second.module).values())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: Model(torch.relu), lambda: Model(torch.sin)),
        (lambda: Model(F.silu), lambda: Model(F.gelu)),
        (lambda: Model(Power(2).of), lambda: Model(Power(3).of)),
        (
            lambda: Model(functools.partial(torch.clamp, min=1)),
            lambda: Model(functools.partial(torch.clamp, min=2)),
        ),
        (lambda: Model(torch.relu, 2), lambda: Model(torch.relu, 3)),
        (lambda: Model(Listed(Listed(2)).of), lambda: Model(Listed(Listed(3)).of)),
        (lambda: Model(torch.relu, True), lambda: Model(torch.relu, 1.0)),
    ],
)
def test_models_that_differ_share_none(one: Callable[[], nn.Module], other: Callable[[], nn.Module]) -> None:
    x = torch.randn(2, 3)
    for make in (one, other, one):
        model = make()
        assert torch.equal(captured(model, x).module(x)[0], model(x))


def test_a_failure_is_raised_again(traces: list[Any]) -> None:
    def branching(x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x

    messages, made = [], []
    for _ in range(2):
        traces.clear()
        with pytest.raises(CaptureError) as caught:
            captured(Model(branching), torch.randn(2, 3))
        messages.append(str(caught.value))
        made.append(len(traces))
    assert messages[0] == messages[1]
    assert made[1] < made[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["OwnDiT", pytest.param("DiT2D", marks=pytest.mark.exhaustive)])
def test_graphs_do_not_depend_on_the_cache_of_fake_tensors(name: str) -> None:
    """Tests trace without it, and users with it."""
    entry = next(entry for entry in ENTRIES if entry.id == name)
    model, found = entry.model(), []
    for cached in (False, True):
        with torch._dynamo.config.patch(fake_tensor_cache_enabled=cached), traced_anew():
            architecture = Architecture.of(model, entry.timestep)
            found.append(architecture.capture(architecture.canonical((), entry.call())))
    first, second = found
    assert first.code == second.code and first.call == second.call
    values = [
        [str(node.meta["val"]) for node in captured.module.graph.nodes if "val" in node.meta] for captured in found
    ]
    assert len(values[0]) > 50 and values[0] == values[1]
