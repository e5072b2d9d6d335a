"""With the cost ``in-place``, only parameters that the model has change, each for all of its readers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.channels.in_place import unfit_weight
from fxquant.channels.solution import Grant, Request
from fxquant.channels.walk import solve
from fxquant.channels.wants import Cost
from tests.support import captured, layer_node, seeds_at

C = 4
Make = Callable[[Any, Tensor], Tensor]


class Model(nn.Module):
    """A linear that reads what one function makes of an input."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.make = make
        self.fc, self.first, self.other = (nn.Linear(C, C) for _ in range(3))
        self.plain = nn.Linear(C, C, bias=False)
        self.norm, self.bare = nn.LayerNorm(C), nn.LayerNorm(C, elementwise_affine=False)
        self.table, self.number = nn.Parameter(torch.randn(C)), nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.fc(self.make(self, x)), torch.tanh(self.other(x))


CASES: dict[str, tuple[Make, str | None, str | None]] = {
    "linear": (lambda m, x: m.first(torch.sin(x)), None, None),
    "linear without bias": (lambda m, x: m.plain(x), None, "has no bias"),
    "shifted linear without bias": (lambda m, x: 1 + m.plain(x), "has no bias", "has no bias"),
    "norm": (lambda m, x: m.norm(x), None, None),
    "norm without weight": (lambda m, x: m.bare(x), "has no weight", "has no bias"),
    "norm in a product": (lambda m, x: m.bare(x) * (1 + m.first(torch.sin(x))), None, "a shift cannot pass mul"),
    "parameter": (lambda m, x: torch.tanh(x) * m.table, None, "a shift cannot pass mul"),
    "parameter with another reader": (
        lambda m, x: (torch.tanh(x) * m.table).tanh() * m.table,
        "is also read by mul",
        "a shift cannot pass mul",
    ),
    "one number": (lambda m, x: torch.tanh(x) * m.number, "tanh is nonlinear", "cannot pass mul"),
    "weight that another call reads": (lambda m, x: m.other(x), "other.weight is also read by", None),
}


def grant(make: Make, request: Request) -> Grant:
    module = captured(Model(make).eval(), torch.randn(2, 3, C)).module
    return solve(module.graph, seeds_at(module, ("fc",)), Cost.IN_PLACE, request).grants["fc"]


@pytest.mark.parametrize("case", CASES)
def test_factors(case: str) -> None:
    make, reason, _ = CASES[case]
    found = grant(make, Request.FACTOR)
    assert found.granted.all() == (reason is None)
    assert found.reason is None if reason is None else not found.granted.any()
    if reason is not None:
        assert reason in str(found.reason), found.reason


@pytest.mark.parametrize("case", [case for case in CASES if case != "weight that another call reads"])
def test_shifts(case: str) -> None:
    make, _, reason = CASES[case]
    found = grant(make, Request.STATIC_SHIFT)
    assert found.granted.all() == (reason is None)
    if reason is not None:
        assert reason in str(found.reason), found.reason


def test_other_costs_allow_what_in_place_does_not() -> None:
    module = captured(Model(CASES["norm without weight"][0]).eval(), torch.randn(2, 3, C)).module
    assert solve(module.graph, seeds_at(module, ("fc",)), Cost.FREE).grants["fc"].granted.all()


def test_readers_must_be_able_to_undo() -> None:
    class Readers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.plain = nn.Linear(C, C), nn.Linear(C, C, bias=False)
            self.tied = nn.Linear(C, C)
            self.tied.weight = self.fc.weight

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return self.fc(x), self.plain(x), F.linear(torch.sin(x), self.fc.weight)

    module = captured(Readers().eval(), torch.randn(2, 3, C)).module
    plain, fc = layer_node(module, "plain"), next(n for n in module.graph.nodes if n.name == "linear")
    assert unfit_weight(plain, "weight") is None
    assert "has no bias" in str(unfit_weight(plain, "bias"))
    assert "weight is also read by linear_2" in str(unfit_weight(fc, "weight"))
    assert unfit_weight(fc, "bias") is None
