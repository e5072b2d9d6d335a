"""The readable text of a graph."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxquant.ir.printing import graph_text
from fxquant.pipeline.pipeline import Pipeline
from tests.passes.models import planned
from tests.support import absorb, captured, golden


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))


def test_notes_tell_which_tensors_passes_changed() -> None:
    module = absorb(Two(), torch.randn(3, 4, dtype=torch.float64)).module
    assert graph_text(module, notes=True) == golden("""
        x: float64[B, 4]
        linear: float64[B, 4] = linear(x, @first.weight, @first.bias)  # first; changed @first.weight, @first.bias
        linear_1: float64[B, 2] = linear(linear, @last.weight, @last.bias)  # last; changed @last.weight
        return linear_1
    """)


def test_notes_tell_which_passes_made_a_node() -> None:
    module = captured(Two(), torch.randn(3, 4)).module
    kept = ("linear", [2, 4], None, None, 0)
    Pipeline.parse("quantize-linears").run(module, planned(first=("linear", [4, 4], 4, None, 0), last=kept))
    assert graph_text(module, notes=True) == golden("""
        x: float32[B, 4]
        dequantize_weight_default: float32[4, 4] = fxquant::dequantize_weight(@first.weight_packed, @first.weight_scale, @first.weight_zero_point, int4, 0, 4, float32)  # first; by quantize-linears; made @first.weight_packed, @first.weight_scale, @first.weight_zero_point
        linear: float32[B, 4] = linear(x, dequantize_weight_default, @first.bias)  # first
        linear_1: float32[B, 2] = linear(linear, @last.weight, @last.bias)  # last
        return linear_1
    """)  # noqa: E501
