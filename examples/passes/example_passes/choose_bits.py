"""Mixed precision: the weight bits of each layer, under a budget."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, fx

from fxquant.authoring import (
    Decision,
    Pass,
    PassContext,
    Rewriter,
    Stage,
    Tier,
    linears_to_quantize,
    quantize_weight,
    register_pass,
    run_with,
    sqnr_db,
)
from fxquant.errors import CalibrationError

LEVELS = (4, 6, 8)


@dataclass
class Sensitivity(Decision, of="choose-bits"):
    """Noise share of the model's output if only this layer's weight has the fewest bits, and the bits chosen."""

    noise: float
    bits: int


@register_pass
@dataclass(frozen=True)
class ChooseBits(Pass):
    """Give each linear 4, 6 or 8 weight bits, more where its rounding disturbs the model's output more.

    The graph does not change; ``quantize-linears`` reads the bits from the plan. The noise of each layer alone is
    measured on calibration calls. Layers get more bits in the order of noise removed per bit, within the budget.

    Attributes:
        mean: Most bits per weight, averaged over all weights that are quantized.
        samples: Number of calibration samples on which noise is measured.
    """

    name: ClassVar[str] = "choose-bits"
    tier: ClassVar[Tier] = Tier.EXACT
    requires: ClassVar[Stage] = Stage.TRANSFORMED
    establishes: ClassVar[Stage] = Stage.CAPTURED

    mean: float = 5.0
    samples: int = 64

    def wants_samples(self) -> int:
        """Calls that the pass runs again."""
        return self.samples

    def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
        decided = context.plan.decisions_of(Sensitivity)
        if decided:
            return
        if not context.inputs:
            raise CalibrationError(f"{self.name} measures on calibration calls; give a recipe and calibrate=")
        noise, sizes, exact = {}, {}, _outputs(context, rewriter, {})
        for layer in linears_to_quantize(graph, context.plan):
            weight = rewriter.tensor(layer.weight)
            rounded = quantize_weight(weight, bits=LEVELS[0], group_size=layer.plan.group_size).dequantize(weight.dtype)
            disturbed = _outputs(context, rewriter, {layer.weight: rounded})
            noise[layer.name], sizes[layer.name] = 10 ** (-sqnr_db(exact, disturbed) / 10), weight.numel()
        for name, bits in choose(noise, sizes, self.mean).items():
            decided[name] = Sensitivity(noise[name], bits)
            context.plan.layer(name).weight_bits = bits


def choose(noise: dict[str, float], sizes: dict[str, int], mean: float) -> dict[str, int]:
    """Bits of each layer, from its noise at the fewest bits and its number of weights, for a mean number of bits."""
    bits, left = dict.fromkeys(noise, LEVELS[0]), (mean - LEVELS[0]) * sum(sizes.values())
    steps = [(name, low, high) for name in noise for low, high in pairwise(LEVELS)]
    # A step from 4 to 6 bits removes 15/16 of the noise, and a step from 6 to 8 bits 15/16 of what is left.
    for name, low, high in sorted(steps, key=lambda step: -noise[step[0]] / sizes[step[0]] / 4 ** step[1]):
        cost = sizes[name] * (high - low)
        if bits[name] == low and cost <= left:
            bits[name], left = high, left - cost
    return bits


def _outputs(context: PassContext, rewriter: Rewriter, tensors: dict[fx.Node, Tensor]) -> Tensor:
    return torch.cat([run_with(rewriter.module, call, tensors)[0].flatten() for call in context.inputs])
