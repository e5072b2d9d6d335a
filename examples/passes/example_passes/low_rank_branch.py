"""A float branch of low rank beside each quantized linear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx
from torch.nn import functional

from fxquant.authoring import (
    Decision,
    Pass,
    PassContext,
    Rewriter,
    Stage,
    Tier,
    changed_by,
    linears_to_quantize,
    made_from,
    register_pass,
)


@dataclass
class Branch(Decision, of="low-rank-branch"):
    """The branch of one layer; to change a branch, edit its rank in the plan."""

    rank: int


@register_pass
@dataclass(frozen=True)
class LowRankBranch(Pass):
    """Move the largest singular values of a weight into a float branch, so that what is left has a smaller range.

    Before::

        y = linear(x, W, bias)

    After, with W = L1 L2 + R and L1 L2 the best approximation of W of its rank::

        y = linear(x, R, bias) + linear(linear(x, L2), L1)

    ``quantize-linears`` then quantizes R, and x for R only. The branch adds ``rank * (in + out)`` products and float
    weights to the ``in * out`` of the layer (SVDQuant, arXiv 2411.05007). Run it after ``absorb-affines``.

    Attributes:
        rank: Rank of the branches; layers with fewer than four times as many inputs or outputs get none.
    """

    name: ClassVar[str] = "low-rank-branch"
    tier: ClassVar[Tier] = Tier.ALGEBRAIC
    requires: ClassVar[Stage] = Stage.TRANSFORMED
    establishes: ClassVar[Stage] = Stage.CAPTURED

    rank: int = 16

    def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
        branches = context.plan.decisions_of(Branch)
        for layer in linears_to_quantize(graph, context.plan):
            node, weight = layer.node, layer.weight
            if 4 * self.rank > min(layer.plan.shape) or changed_by(weight, self.name):
                continue
            rank = branches.setdefault(layer.name, Branch(self.rank)).rank
            left, right = best_approximation(rewriter.tensor(weight), rank)
            source = (rewriter.history(weight), str(rank))
            factors = [
                rewriter.constant(f"{layer.name}.{side}", factor, [weight], made_from(side, *source))
                for side, factor in (("low_rank_out", left), ("low_rank_in", right))
            ]
            rewriter.fold(node, "weight", lambda w, a=left, b=right: w.double() - a.double() @ b.double(), source[1:])
            with rewriter.after(node):
                total = rewriter.inline(add_branch, [node, layer.input, *factors], [node])
            rewriter.replace(node, total)  # For all readers but ``total`` itself.


def add_branch(y: Tensor, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The result of the layer plus that of the branch."""
    return y + functional.linear(functional.linear(x, right), left)


def best_approximation(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors ``[out, rank]`` and ``[rank, in]`` whose product is nearest to a weight ``[out, in]``; in its dtype."""
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    root = s[:rank].sqrt()
    return (u[:, :rank] * root).to(weight.dtype).contiguous(), (root[:, None] * v[:rank]).to(weight.dtype).contiguous()
