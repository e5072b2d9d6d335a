"""The record of what a pass did: nodes, and tensors with the ranges of factors."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, fx, nn

from fxquant.ir.edits import EditLog, NodeEdit, TensorEdit
from fxquant.ir.rewriter import Rewriter
from tests.support import captured, layer_node, nodes_of

aten = torch.ops.aten


class Two(nn.Module):
    """Two linears that read one value; ``a`` and ``c`` share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.c.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).relu() + self.b(x) + self.c(x)


@pytest.fixture
def module() -> fx.GraphModule:
    return captured(Two(), x=torch.randn(2, 4)).module


@pytest.fixture
def rewriter(module: fx.GraphModule) -> Rewriter:
    return Rewriter(module, "test")


def edits(log: EditLog) -> list[tuple[str, str]]:
    return [(edit.what, edit.node) for edit in log.nodes]


def test_nodes_made_rewired_and_erased(module: fx.GraphModule, rewriter: Rewriter) -> None:
    (relu,) = nodes_of(module, aten.relu.default)
    (reader,) = relu.users
    with rewriter.after(relu):
        new = rewriter.call(aten.silu.default, (relu.args[0],), [relu])
    rewriter.replace(relu, new)
    rewriter.set_argument(reader, "alpha", 2)
    rewriter.leave_out(layer_node(module, "b"), "bias")
    other = rewriter.call(aten.relu.default, (new,), [new])
    rewriter.redirect(reader, new, other)
    unread = rewriter.call(aten.relu.default, (new,), [new])
    rewriter.erase(unread)
    assert edits(rewriter.log) == [
        ("made", new.name),
        ("rewired", reader.name),
        ("erased", "relu"),
        ("rewired", reader.name),
        ("rewired", "linear_1"),
        ("made", other.name),
        ("rewired", reader.name),
        ("made", unread.name),
        ("erased", unread.name),
    ]
    assert rewriter.log.counts() == {"made": 3, "rewired": 4, "erased": 2}


def test_a_fold_says_its_range(module: fx.GraphModule, rewriter: Rewriter) -> None:
    node, factor, shift = layer_node(module, "b"), torch.tensor([1.0, 2, 4, 8]), torch.tensor([-1.0, 0, 0, 3])
    rewriter.fold(node, "weight", lambda w: w * factor, by=("columns", factor))
    rewriter.fold(node, "weight", lambda w: w * factor[:, None], by=("rows", factor))
    rewriter.fold(node, "bias", lambda b: b * factor + shift, by=("affine", factor, shift))
    rewriter.fold(node, "bias", lambda b: b + shift, by=("shift", shift))
    rewriter.fold(node, "bias", lambda b: b + shift, by=("shift", "digest of a table"))
    rewriter.fold(node, "bias", lambda b: b * 2)
    assert rewriter.log.tensors == [
        TensorEdit("folded", "b.weight", along="columns", factor=(1.0, 8.0)),
        TensorEdit("folded", "b.weight", along="rows", factor=(1.0, 8.0)),
        TensorEdit("folded", "b.bias", along="affine", factor=(1.0, 8.0), shift=(-1.0, 3.0)),
        TensorEdit("folded", "b.bias", shift=(-1.0, 3.0)),
        TensorEdit("folded", "b.bias"),
        TensorEdit("replaced", "b.bias"),
    ]
    assert rewriter.log.counts() == {"folded": 5, "replaced": 1}


def test_a_shared_parameter_is_copied_first(module: fx.GraphModule, rewriter: Rewriter) -> None:
    factor = torch.full((4,), 2.0)
    rewriter.fold(layer_node(module, "a"), "weight", lambda w: w * factor, by=("columns", factor))
    copied, folded = rewriter.log.tensors
    assert copied == TensorEdit("copied", "c.weight_of_a", source="c.weight")
    assert folded == TensorEdit("folded", "c.weight_of_a", along="columns", factor=(2.0, 2.0))


def test_tensors_made_and_dropped(module: fx.GraphModule, rewriter: Rewriter) -> None:
    node = layer_node(module, "b")
    rewriter.constant("b.scale", torch.ones(1), [node])
    rewriter.forget(node.args[1])
    assert rewriter.log.tensors == [TensorEdit("made", "b.scale"), TensorEdit("dropped", "b.weight")]
    assert rewriter.log.nodes == [NodeEdit("made", "b_scale")]


def test_factors_without_values_have_no_range(rewriter: Rewriter, module: fx.GraphModule) -> None:
    fake = rewriter.infer(layer_node(module, "b"))
    assert TensorEdit.folded("w", ("columns", fake)) == TensorEdit("folded", "w", along="columns")


def test_it_is_json(rewriter: Rewriter) -> None:
    rewriter.constant("one", torch.ones(1), [])
    data = json.loads(json.dumps(rewriter.log.to_json()))
    assert data["nodes"] == [{"what": "made", "node": "one"}]
    assert data["tensors"][0]["tensor"] == "one"
