"""Which values a trace marks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.capture.trace import Architecture
from fxquant.ir.borders import Border, borders


class Block(nn.Module):
    def forward(self, image: Tensor, *, text: Tensor, mask: Any = None) -> tuple[Tensor, Tensor]:
        return text * 2, image + text


class Model(nn.Module):
    def __init__(self, block: nn.Module, writes: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block])
        self.writes = writes

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        text, x = self.blocks[0](x, text=text)
        if self.writes:
            x[:, :1] = 0.0
        return x - text


def traced(model: nn.Module) -> fx.Graph:
    architecture = Architecture.of(model.eval(), None)
    call = architecture.canonical((torch.ones(2, 4), torch.ones(2, 4)), {})
    return architecture.capture(call).module.graph


def test_arguments_by_name_and_results_by_position() -> None:
    found = borders(traced(Model(Block())))
    targets = {border: [node.target for node in nodes] for border, nodes in found.items()}
    assert targets == {
        Border("blocks.0", "image", 0): ["x"],
        Border("blocks.0", "text", 0): ["text"],
        Border("blocks.0", None, 0): [torch.ops.aten.mul.Tensor],
        Border("blocks.0", None, 1): [torch.ops.aten.add.Tensor],
    }


def test_values_that_are_written_into_are_not_marked() -> None:
    """Their node holds the value of before or after the write, and which of both the module returned is not known."""
    found = borders(traced(Model(Block(), writes=True)))
    assert Border("blocks.0", None, 0) in found
    assert Border("blocks.0", None, 1) not in found


def test_tracing_leaves_no_hook() -> None:
    model = Model(Block())
    architecture = Architecture.of(model.eval(), None)
    architecture.capture(architecture.canonical((torch.ones(2, 4), torch.ones(2, 4)), {}))
    assert not any(module._forward_hooks for module in architecture.skeleton.modules())
