"""The linears that a plan quantizes, and how a pass finds what it has rewritten."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxquant.ir.arguments import args
from fxquant.ir.rewriter import Rewriter
from fxquant.planning.decisions import LayerPlan
from fxquant.planning.linears import changed_by, linears_to_quantize
from fxquant.planning.plan import Plan
from tests.support import captured, layer_node


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(self.a(x)))) @ x.transpose(-1, -2)


def test_those_with_quantized_weight_and_input() -> None:
    module = captured(Three(), x=torch.randn(2, 3, 4)).module
    plan = Plan("", "", None)
    bits = {"a": (4, 8), "b": (4, None), "c": (None, None)}  # The plan does not know d.
    plan.layers = {name: LayerPlan("linear", "block", [4, 4], *each) for name, each in bits.items()}
    found = linears_to_quantize(module.graph, plan)
    (linear,) = found
    assert (linear.name, linear.node, linear.plan) == ("a", layer_node(module, "a"), plan.layers["a"])
    assert (linear.weight.target, linear.input.target) == ("a.weight", "x")
    assert [each.name for each in linears_to_quantize(module.graph, plan, {"c", "d"})] == ["a", "c"]


def test_what_a_pass_changed() -> None:
    module = captured(Three(), x=torch.randn(2, 3, 4)).module
    node, rewriter = layer_node(module, "a"), Rewriter(module, "doubling")
    weight = args(node).node("weight")
    assert not changed_by(weight, "doubling")
    rewriter.fold(node, "weight", lambda w: 2 * w, by=("doubled",))
    assert changed_by(weight, "doubling") and not changed_by(weight, "halving")
    assert not changed_by(node, "doubling")
