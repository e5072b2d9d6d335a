"""Solutions in which channels that must agree do agree, and folds for some readers of a parameter."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxquant.channels.apply import agreed, fold_into_parameters
from fxquant.channels.rules.ends import parameter
from fxquant.channels.solution import Edit, Seed
from fxquant.channels.wants import Cost, End, Want
from fxquant.ir.rewriter import Rewriter
from tests.support import captured, layer_node, nodes_of

aten = torch.ops.aten


class TwoReaders(nn.Module):
    """Two linears read one value through a permutation of tokens, so that their channels share factors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.one, self.two = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.one(y.clone()) + self.two(y.clone())


def test_a_seed_that_disagrees_is_left_out() -> None:
    graph = captured(TwoReaders(), torch.randn(2, 3, 4)).module.graph
    seeds = [
        Seed(name, (node := layer_node(graph.owning_module, name)).all_input_nodes[0], (node,))
        for name in ("one", "two")
    ]
    same = agreed(graph, seeds, {"one": [1.0, 2.0, 3.0, 4.0], "two": [1.0, 2.0, 3.0, 4.0]})
    assert set(same.grants) == {"one", "two"}
    other = agreed(graph, seeds, {"one": [1.0, 2.0, 3.0, 4.0], "two": [1.0, 2.0, 3.0, 5.0]})
    assert set(other.grants) == {"one"}


class SharedRow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x * self.row) * self.row


def test_a_parameter_changes_for_the_readers_of_the_edit() -> None:
    module = captured(SharedRow(), torch.randn(2, 4)).module
    first, last = nodes_of(module, aten.mul.Tensor)
    row, rewriter = first.args[1], Rewriter(module, "test")
    end = parameter(row, Want.identity(1))
    assert isinstance(end, End)
    edit = Edit(row, Want.identity(1), Cost.FREE, end, (last,))
    own = fold_into_parameters(edit, end, rewriter, torch.full((4,), 2.0).double(), torch.zeros(4).double())
    assert last.args[1] is own and first.args[1] is row
    assert torch.equal(rewriter.tensor(own), torch.full((4,), 2.0)) and torch.equal(rewriter.tensor(row), torch.ones(4))
