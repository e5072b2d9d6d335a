"""Hadamard rotation of the inputs of linears."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from scipy.linalg import hadamard
from torch import Tensor, fx

from fxquant.authoring import (
    Decision,
    Pass,
    PassContext,
    Rewriter,
    Stage,
    Tier,
    changed_by,
    linears_to_quantize,
    register_pass,
)


@dataclass
class Rotation(Decision, of="rotate-inputs"):
    """The rotation of the input of one layer, in blocks of ``size`` channels; a size of 1 means none."""

    size: int


@register_pass
@dataclass(frozen=True)
class RotateInputs(Pass):
    """Rotate the inputs of linears, so that no channel stands out and one range fits all channels.

    Before::

        y = linear(x, W, bias)

    After, with a symmetric orthogonal matrix H, so that ``(x H) (W H)^T = x W^T``::

        y = linear(x H, W H, bias)

    H consists of equal Hadamard matrices along its diagonal, whose size is the largest power of two that divides the
    number of channels (QuaRot, arXiv 2404.00456). ``x H`` is computed at run time, once for all linears that read x.
    Before calibration, which then observes ``x H``, the ranges are exact. After calibration, and then best after
    ``absorb-affines``, the ranges are those of the sampled rows, rotated.

    Attributes:
        least: Inputs that allow only smaller blocks are left alone.
    """

    name: ClassVar[str] = "rotate-inputs"
    tier: ClassVar[Tier] = Tier.ALGEBRAIC
    requires: ClassVar[Stage] = Stage.TRANSFORMED
    establishes: ClassVar[Stage] = Stage.CAPTURED

    least: int = 16

    def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
        rotations = context.plan.decisions_of(Rotation)
        for layer in linears_to_quantize(graph, context.plan):
            channels = layer.plan.shape[1]
            largest = channels & -channels  # The largest power of two that divides it.
            size = rotations.setdefault(layer.name, Rotation(largest if largest >= self.least else 1)).size
            if size == 1 or changed_by(layer.weight, self.name):
                continue
            node, x, h, made = layer.node, layer.input, matrix(size), rewriter.memo
            key = (size, x.meta["val"].dtype, x.meta["val"].device)
            if key not in made:
                made[key] = rewriter.constant(f"hadamard_{size}", h.to(key[2], key[1]), [x])
            if (x, size) not in made:
                with rewriter.before(node):
                    made[x, size] = rewriter.inline(rotate, [x, made[key]], [x])
            rewriter.fold(node, "weight", lambda w, h=h: rotate(w.double(), h.to(w.device)), by=("hadamard", str(size)))
            rewriter.redirect(node, x, made[x, size])
            context.transform_input(layer.name, lambda rows, h=h: rotate(rows, h))


def matrix(size: int) -> Tensor:
    """The Hadamard matrix divided by the root of its size: float64 ``[size, size]``, symmetric and orthogonal."""
    return torch.from_numpy(hadamard(size)).double() / size**0.5


def rotate(rows: Tensor, h: Tensor) -> Tensor:
    """Rotate rows ``[..., channels]`` in blocks of the size of ``h``."""
    return (rows.unflatten(-1, (-1, len(h))) @ h).flatten(-2)
