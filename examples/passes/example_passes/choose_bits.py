"""Mixed precision: the weight bits of each layer, under a budget."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

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
    sqnr_db,
    stored_weight,
)
from fxquant.errors import CalibrationError

LEVELS = (4, 6, 8)


@dataclass
class Sensitivity(Decision, of="choose-bits"):
    """Share of noise in the model's output if only the weight of this layer has the fewest bits, and the choice."""

    noise: float
    bits: int


@register_pass
@dataclass(frozen=True)
class ChooseBits(Pass):
    """Give each linear 4, 6 or 8 weight bits, more where its rounding disturbs the model's output more.

    The graph does not change; ``quantize-linears`` reads the bits from the plan. The noise of each layer at the fewest
    bits is measured on calibration calls, one at a time. Two more bits leave a sixteenth of it. Layers get more bits in
    the order of noise removed per bit, until the budget is used up.

    Attributes:
        mean: Most bits per weight, averaged over all weights that are quantized.
        samples: Number of calibration samples on which noise is measured.
    """

    name: ClassVar[str] = "choose-bits"
    tier: ClassVar[Tier] = Tier.EXACT
    requires: ClassVar[Stage] = Stage.TRANSFORMED
    establishes: ClassVar[Stage] = Stage.CAPTURED

    mean: float = 5.0
    samples: int = 16

    def wants_samples(self) -> int:
        """Calls that the pass runs again."""
        return self.samples

    def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
        decided = context.plan.decisions_of(Sensitivity)
        if decided:
            return
        if not context.inputs:
            raise CalibrationError(f"{self.name} measures on calibration calls; give a recipe and calibrate=")
        noise, sizes = {}, {}
        exact = _outputs(fx.Interpreter(rewriter.module), context)
        for name, node, layer in linears_to_quantize(graph, context.plan):
            weight = rewriter.tensor(stored_weight(node))
            rounded = quantize_weight(weight, bits=LEVELS[0], group_size=layer.group_size).dequantize(weight.dtype)
            noise[name] = 10 ** (-sqnr_db(exact, _outputs(Rounded(rewriter.module, node, rounded), context)) / 10)
            sizes[name] = weight.numel()
        for name, bits in choose(noise, sizes, self.mean).items():
            decided[name] = Sensitivity(noise[name], bits)
            context.plan.layer(name).weight_bits = bits


def choose(noise: dict[str, float], sizes: dict[str, int], mean: float) -> dict[str, int]:
    """Bits of each layer, from its noise at the fewest bits and its number of weights, for a mean number of bits."""
    bits = dict.fromkeys(noise, LEVELS[0])
    left = (mean - LEVELS[0]) * sum(sizes.values())
    steps = [(name, low, high) for name in noise for low, high in pairwise(LEVELS)]
    # Each step from 4 to 6 bits removes 15/16 of the noise, and each step from 6 to 8 bits 15/16 of the rest.
    for name, low, high in sorted(steps, key=lambda step: noise[step[0]] / sizes[step[0]] / 4 ** step[1], reverse=True):
        cost = sizes[name] * (high - low)
        if bits[name] == low and cost <= left:
            bits[name], left = high, left - cost
    return bits


class Rounded(fx.Interpreter):
    """Runs a graph with another weight for one linear."""

    def __init__(self, module: fx.GraphModule, layer: fx.Node, weight: Tensor) -> None:
        super().__init__(module)
        self.layer, self.weight = layer, weight

    def run_node(self, n: fx.Node) -> Any:
        if n is not self.layer:
            return super().run_node(n)
        (x, _, *bias), _ = self.fetch_args_kwargs_from_env(n)
        return n.target(x, self.weight, *bias)


@torch.no_grad()
def _outputs(runner: fx.Interpreter, context: PassContext) -> Tensor:
    return torch.cat([runner.run(*call)[0].flatten() for call in context.inputs])
