"""The walk itself: which channels share a factor, what it costs, and why not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxquant.channels.readers import readers_of
from fxquant.channels.solution import Seed, Solution
from fxquant.channels.walk import solve
from fxquant.channels.wants import Cost, Want
from tests.support import absorb, captured, layer_node, nodes_of, seeds_at

C = 4


class Two(nn.Module):
    """Two linears behind a producer, which the option changes."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.into, self.vector = nn.Linear(C, C), nn.Linear(C, C)
        self.first, self.second = nn.Linear(C, 2), nn.Linear(C, 2)
        self.way = way

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        y, vector = self.into(x), F.silu(self.vector(t))
        if self.way == "both":
            return self.first(y), self.second(y)
        if self.way == "relu":
            return self.first(F.relu(y)), self.second(-y)
        if self.way == "residual":
            return self.first(y), y
        if self.way == "permuted":
            return self.first(y), self.second(torch.cat([y[..., 2:], y[..., :2]], -1))
        if self.way == "vector":
            return self.first(F.silu(x) * vector[:, None]), self.second(F.gelu(x))
        assert self.way == "shape"
        return self.first(y), self.second(x).expand(y.shape[0], -1, -1)


def graph(way: str) -> fx.Graph:
    return captured(Two(way), torch.randn(2, 3, C), torch.randn(2, C)).module.graph


def solved(way: str, at: tuple[str, ...] = ("first", "second"), dearest: Cost = Cost.VECTOR) -> Solution:
    module = captured(Two(way), torch.randn(2, 3, C), torch.randn(2, C)).module
    return solve(module.graph, seeds_at(module, at), dearest)


def test_readers_of_one_value_are_one_seed() -> None:
    solution = solved("both")
    assert list(solution.grants) == ["first"]
    assert [reader.name for reader in solution.grants["first"].seed.readers] == ["linear_2", "linear_3"]
    assert solution.grants["first"].seed.channels == C


def test_requests_that_meet_share_their_factors() -> None:
    solution = solved("relu")
    assert solution.groups() == [["first", "second"]]
    first, second = (solution.grants[name] for name in ("first", "second"))
    assert (first.classes == second.classes).all()
    assert len(solution.edits) == 1


def test_requests_that_meet_in_another_order_share_class_by_class() -> None:
    solution = solved("permuted")
    first, second = (solution.grants[name].classes.tolist() for name in ("first", "second"))
    # Channel i meets channel i + 2, both ways round.
    assert first == second[2:] + second[:2]


def test_a_reader_of_the_shape_does_not_stop_a_request() -> None:
    assert solved("shape", ("first",)).grants["first"].granted.all()


def test_an_output_of_the_model_is_a_reader() -> None:
    grant = solved("residual", ("first",)).grants["first"]
    assert (grant.cost, grant.reason) == (Cost.NOT, "linear (into) is also read by output (output)")


@pytest.mark.parametrize(
    ("dearest", "first", "second"),
    [
        (Cost.FREE, (Cost.NOT, "silu is nonlinear"), (Cost.NOT, "gelu is nonlinear")),
        (Cost.VECTOR, (Cost.VECTOR, None), (Cost.NOT, "gelu is nonlinear")),
        (Cost.TOKENS, (Cost.VECTOR, None), (Cost.TOKENS, None)),
    ],
)
def test_no_more_is_paid_than_is_allowed(
    dearest: Cost, first: tuple[Cost, str | None], second: tuple[Cost, str | None]
) -> None:
    grants = solved("vector", dearest=dearest).grants
    assert (grants["first"].cost, grants["first"].reason) == first
    assert (grants["second"].cost, grants["second"].reason) == second


def test_factors_are_laid_out_as_the_request() -> None:
    solution = solved("both")
    chosen = torch.arange(2.0, 2 + C, dtype=torch.float64)
    ((edit, factor),) = solution.factors({"first": chosen})
    assert edit.into == "into"
    assert factor.shape == (1, 1, C)
    assert torch.equal(factor.flatten(), chosen)


def test_nothing_asked_nothing_done() -> None:
    solution = solve(graph("both"), [])
    assert not solution.grants
    assert not solution.edits
    assert solution.groups() == []


def test_nothing_is_changed() -> None:
    module = captured(Two("both"), torch.randn(2, 3, C), torch.randn(2, C)).module
    before = str(module.graph)
    solve(module.graph, seeds_at(module, ["first"]))
    assert str(module.graph) == before


def test_parts_are_read_each_for_itself() -> None:
    class Parts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            first, second = x.chunk(2, -1)
            return first.tanh() + second.relu() + x.shape[1]

    module = captured(Parts(), x=torch.randn(2, 3, C)).module
    x = next(iter(module.graph.nodes))
    assert [reader.name for reader in readers_of(x)] == ["getitem", "getitem_1"]


def test_a_seed_on_another_axis() -> None:
    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(2, C, 1), nn.Conv2d(C, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.a(x)))

    module = captured(Conv(), x=torch.randn(2, 2, 5, 5)).module
    (relu,) = nodes_of(module, torch.ops.aten.relu.default)
    solution = solve(module.graph, [Seed("b", relu, (layer_node(module, "b"),), axis=1)])
    assert solution.grants["b"].into == ("a",)
    assert len(set(solution.grants["b"].classes.tolist())) == C


def test_costs_read_as_words() -> None:
    assert [str(cost) for cost in Cost] == ["in-place", "free", "vector", "tokens", "not"]
    assert Want.identity(3).trivial


@pytest.mark.parametrize("cast", [False, True])
def test_what_is_cast_to_the_dtype_of_tokens_has_no_tokens(cast: bool) -> None:
    """As Wan has it: one vector for all blocks, cast as the text is. Each block has factors of its own."""

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.vector, self.first, self.second = nn.Linear(C, 2 * C), nn.Linear(C, C), nn.Linear(C, C)
            self.tables = nn.ParameterList([nn.Parameter(torch.randn(1, 2, C)) for _ in range(2)])

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            vector = self.vector(t)
            vector = (vector.type_as(x) if cast else vector).unflatten(1, (2, C))
            for table, last in zip(self.tables, (self.first, self.second), strict=True):
                scale, shift = (table + vector).chunk(2, dim=1)
                x = x + last(F.layer_norm(x, (C,)) * (1 + scale) + shift)
            return x

    result = absorb(Blocks(), x=torch.randn(2, 3, C).double(), t=torch.randn(2, C).double(), at=("first", "second"))
    assert result.error < 1e-12
    assert [grant.cost for grant in result.grants.values()] == [Cost.VECTOR, Cost.VECTOR]
    assert result.groups == [["first"], ["second"]]
