"""Ops on the same values become one; what only looks alike does not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxquant.backends.native.sharing import share
from fxquant.ir.rewriter import Rewriter
from tests.support import captured, count, outputs

aten = torch.ops.aten


class Twice(nn.Module):
    def forward(self, t: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        waves = [torch.cat([(t[:, None] * f).sin() for f in (1.0, 2.0)], -1) for _ in range(3)]
        whole, real = t * 2, t * 2.0
        noise = [torch.rand_like(x) for _ in range(2)]
        return waves[0] + x, waves[1] * x, waves[2], whole, real, *noise


def test_what_is_computed_again_is_computed_once() -> None:
    inputs = torch.tensor([1, 5]), torch.randn(2, 2)
    module = captured(Twice(), *inputs).module
    before = outputs(module, *inputs)
    rewriter = Rewriter(module, "share")
    share(module.graph, rewriter)
    module.recompile()
    after = outputs(module, *inputs)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(before[:5], after[:5], strict=True))
    assert count(module, aten.sin.default) == 2
    assert count(module, aten.cat.default) == 1
    assert count(module, aten.rand_like.default) == 2
    assert rewriter.edits
