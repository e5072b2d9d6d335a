"""What lets tests share traces tells models apart by all that a trace depends on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.capture.graph import CapturedGraph
from fxquant.capture.trace import Architecture
from fxquant.errors import CaptureError
from tests.traces import traced_once


class Power:
    """An object with a method, and with an attribute that the method reads."""

    def __init__(self, exponent: int) -> None:
        self.exponent = exponent

    def of(self, x: Tensor) -> Tensor:
        return x**self.exponent


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
