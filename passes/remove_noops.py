"""Remove ops that do nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxquant.ir.arguments import args, source_of
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.stages import Stage
from fxquant.pipeline.pipeline import Pass, Tier, register_pass
from fxquant.planning.context import PassContext

aten = torch.ops.aten

_CASTS = (aten.to.dtype, aten.to.device, aten.to.other, aten.to.dtype_layout, aten.type_as.default)


@register_pass
@dataclass(frozen=True)
class RemoveNoOps(Pass):
    """Remove ops that return their input bit for bit.

    Before::

        a = slice(x, 0, 0, end); b = dropout(a, 0.1, train=False); c = div(b, 1.0); y = linear(c, w)

    After::

        y = linear(x, w)

    The pass removes full slices, casts to the dtype and device that the value has, dropout in evaluation mode,
    multiplication and division by 1, ``detach`` of a parameter, and ``contiguous`` of a contiguous parameter. It does
    not remove copies, because a reader might depend on their memory, or the addition of 0, which turns -0 into 0. Side
    condition: same shape, same dtype.
    """

    name: ClassVar[str] = "remove-no-ops"
    tier: ClassVar[Tier] = Tier.EXACT
    requires: ClassVar[Stage] = Stage.LOWERED
    establishes: ClassVar[Stage] = Stage.CAPTURED
    keeps_inputs: ClassVar[bool] = True

    def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
        for node in list(graph.nodes):
            if node.op == "call_function" and _returns_input(node):
                source = source_of(node)
                if str(source.meta["val"].shape) == str(node.meta["val"].shape):
                    rewriter.replace(node, source)


def _returns_input(node: fx.Node) -> bool:
    source, after = next(iter(node.args), None), node.meta.get("val")
    if not isinstance(source, fx.Node) or not isinstance(after, torch.Tensor):
        return False
    before = source.meta.get("val")
    if not isinstance(before, torch.Tensor) or before.dtype != after.dtype:
        return False
    if node.target is aten.slice.Tensor:
        return True  # The caller compares the shapes.
    if node.target in _CASTS:  # Return their input if dtype and device are the same and no other option is set.
        given = args(node).by_name()
        more = (given.get(name) for name in ("copy", "memory_format", "pin_memory"))
        return (before.device, before.layout) == (after.device, after.layout) and not any(more)
    if node.target in (aten.detach.default, aten.alias.default):
        return source.op == "get_attr"
    if node.target is aten.contiguous.default:
        return source.op == "get_attr" and before.is_contiguous() and not args(node).gives("memory_format")
    if node.target is aten.dropout.default:
        return args(node).train is False
    if node.target in (aten.mul.Tensor, aten.div.Tensor):
        other = args(node).other
        return isinstance(other, (int, float)) and other == 1
    return False
