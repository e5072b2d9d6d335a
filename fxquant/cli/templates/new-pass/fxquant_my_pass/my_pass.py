"""The pass my-pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxquant.authoring import (
    Decision,
    Pass,
    PassContext,
    Rewriter,
    Stage,
    Tier,
    args,
    changed_by,
    linears_to_quantize,
    register_pass,
)


@dataclass
class Scaling(Decision, of="my-pass"):
    """What the pass decided for one layer. Checkpoints keep it; fields are numbers, text, lists or tensors."""

    factor: float


@register_pass
@dataclass(frozen=True)
class MyPass(Pass):
    """Divide the weight of each linear by a factor, and multiply its result by it.

    Before::

        y = linear(x, W, bias)

    After::

        y = linear(x, W / factor, bias / factor) * factor

    Attributes:
        factor: The factor; a power of two changes no bit of the output.
    """

    name: ClassVar[str] = "my-pass"
    tier: ClassVar[Tier] = Tier.ALGEBRAIC
    requires: ClassVar[Stage] = Stage.TRANSFORMED
    establishes: ClassVar[Stage] = Stage.CAPTURED

    factor: float = 2.0

    def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
        """Rewrite a graph: carry out what the plan holds; decide and add to it what it lacks."""
        decided = context.plan.decisions_of(Scaling)
        for layer in linears_to_quantize(graph, context.plan):
            node = layer.node
            if changed_by(layer.weight, self.name):  # A second run changes nothing.
                continue
            factor = decided.setdefault(layer.name, Scaling(self.factor)).factor
            for parameter in ("weight", "bias"):
                if getattr(args(node), parameter) is not None:
                    rewriter.fold(node, parameter, lambda w, f=factor: w.double() / f, by=("divided", str(factor)))
            with rewriter.after(node):
                scaled = rewriter.call(torch.ops.aten.mul.Tensor, (node, factor), [node])
            rewriter.replace(node, scaled)  # For all readers but ``scaled`` itself.
