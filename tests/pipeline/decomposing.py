"""A package that adds a stage: graphs without GELU, which a pass makes, and from which another pass decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from fxquant.authoring import Pass, PassContext, Rewriter, Stage, Tier, args, register_pass, register_stage

GELU = torch.ops.aten.gelu.default


def no_gelu(node: fx.Node) -> str | None:
    """The condition of the stage."""
    return "a GELU should be written as other ops" if node.target is GELU else None


DECOMPOSED = register_stage("test-decomposed", after=Stage.TRANSFORMED, check=no_gelu)


def written_out(x: Tensor) -> Tensor:
    """GELU by the error function."""
    return 0.5 * x * (1 + torch.erf(x * 0.5**0.5))


@register_pass
@dataclass(frozen=True)
class WriteOut(Pass):
    """Write GELU as other ops."""

    name: ClassVar[str] = "test-write-out"
    tier: ClassVar[Tier] = Tier.ALGEBRAIC
    requires: ClassVar[Stage] = Stage.TRANSFORMED
    establishes: ClassVar[Stage] = DECOMPOSED
    forgets: bool = False

    def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
        for node in [] if self.forgets else list(graph.nodes):
            if node.target is GELU and args(node).approximate == "none":
                with rewriter.after(node):
                    new = rewriter.inline(written_out, [args(node).node("self")], [node])
                rewriter.replace(node, new)


@register_pass
@dataclass(frozen=True)
class Late(Pass):
    """Works on graphs without GELU too, and leaves an ATen op more."""

    name: ClassVar[str] = "test-late"
    tier: ClassVar[Tier] = Tier.EXACT
    requires: ClassVar[Stage] = DECOMPOSED
    establishes: ClassVar[Stage] = Stage.CAPTURED

    def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
        (output,) = (node for node in graph.nodes if node.op == "output")
        value = output.args[0][0]  # type: ignore[index]
        assert isinstance(value, fx.Node)
        if value.target is not torch.ops.aten.clone.default:
            with rewriter.before(output):
                new = rewriter.call(torch.ops.aten.clone.default, (value,), [value])
            rewriter.redirect(output, value, new)
