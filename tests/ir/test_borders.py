"""Marks of the values that modules receive and return, while graphs are rewritten."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

import fxquant
from fxquant.capture.trace import Architecture
from fxquant.ir.borders import Border, borders
from fxquant.ir.rewriter import Rewriter
from tests.tiny import calibrate, make_dit

RETURNED = Border("a", None, 0)


class Small(nn.Module):
    """``relu(x) + 1``; module ``a`` returns the first value."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + 1


def small() -> fx.GraphModule:
    architecture = Architecture.of(Small().eval(), None)
    return architecture.capture(architecture.canonical((torch.ones(2, 3),), {})).module


def test_traces_mark_what_modules_receive_and_return() -> None:
    found = borders(small().graph)
    assert [node.target for node in found[RETURNED]] == [torch.ops.aten.relu.default]


def test_a_mark_moves_to_the_value_in_place_of_another() -> None:
    module = small()
    (node,) = borders(module.graph)[RETURNED]
    rewriter = Rewriter(module, "test")
    with rewriter.after(node):
        new = rewriter.call(torch.ops.aten.clamp_min.default, (node.args[0], 0.0), [node])
    rewriter.replace(node, new)
    assert borders(module.graph)[RETURNED] == [new]


def test_a_mark_stays_if_the_other_value_has_another_shape() -> None:
    module = small()
    (node,) = borders(module.graph)[RETURNED]
    rewriter = Rewriter(module, "test")
    with rewriter.after(node):
        new = rewriter.call(torch.ops.aten.sum.dim_IntList, (node, [1], True), [node])
    rewriter.replace(node, new)
    assert borders(module.graph)[RETURNED] == [node]


def test_marks_of_blocks_survive_every_stage() -> None:
    model = make_dit(2)
    made = fxquant.compile(model, recipe="ptq4dit-w8a8", backend="native", calibrate=calibrate(model), measure=0)
    found = borders(made.graphs[0].graph)
    for block in ("transformer_blocks.0", "transformer_blocks.1"):
        for border in (Border(block, "hidden_states", 0), Border(block, None, 0)):
            assert len(found[border]) == 1
    handed_on = Border("transformer_blocks.1", "hidden_states", 0)
    assert found[Border("transformer_blocks.0", None, 0)] == found[handed_on]
