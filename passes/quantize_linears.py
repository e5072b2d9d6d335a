"""Replace linears by quantized ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxquant.errors import ConfigurationError
from fxquant.ir.arguments import args
from fxquant.ir.meta import LAYER
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.stages import Stage
from fxquant.ir.time_tables import plus_rows
from fxquant.numerics.weights import QuantizedWeight
from fxquant.passes._inputs import InputRange, quantized_input
from fxquant.passes._quantization import drop_used_moments, is_quantized, optional, quantized_weight, rounded_weight
from fxquant.passes._rounders import GPTQ, AdaRound, RangeSearch, Rounder, Rounding
from fxquant.passes._sharing import round_on_ranks, unrounded
from fxquant.pipeline.pipeline import Pass, Tier, register_pass
from fxquant.planning.context import PassContext
from fxquant.planning.decisions import LayerPlan
from fxquant.planning.linears import is_rounded


@register_pass
@dataclass(frozen=True)
class QuantizeLinears(Pass):
    """Quantize the weights of linears, and their inputs if the plan assigns bits to the inputs.

    Before::

        y = linear(x, W, bias)

    After, with static ranges of x found in calibration::

        y = fxquant.linear(fxquant.quantize(x, s, z), s, z, W_packed, W_scale, W_zero_point, bias)

    or, for float activations::

        y = linear(x, fxquant.dequantize_weight(W_packed, W_scale, W_zero_point), bias)

    A bias that depends on the timestep, ``linear(x, W) + table[bin]``, becomes the bias of the quantized linear,
    and if the plan has bins for a layer, the scale and zero point of x are rows of tables too. Linears that read the
    same value share its codes. Integer weights have one grid per output channel, or one per group of input channels.
    Integer activations have one asymmetric grid per tensor (PTQ4DiT, arXiv 2405.16005). Rounding moves each weight by
    at most half a step of its grid. Formats with blocks find the scales of blocks of activations at run time.

    Attributes:
        weight_range: How the range of a weight grid is found: ``minmax``, ``percentile`` or ``mse``. The searches
            weight the error of a column by the mean square of that input, so that they measure the error of the layer's
            output.
        activation_range: The same for activations, on rows sampled in calibration; or ``dynamic``: every token gets the
            range of its own channels at run time.
        symmetric: Whether weight grids are symmetric about 0.
        rounding: ``nearest``; ``gptq``: later columns compensate the error of earlier columns
            (:mod:`fxquant.numerics.rounding.gptq`); or ``adaround``: it is learned whether a weight is rounded up or
            down (:mod:`fxquant.numerics.rounding.adaround`). Layers with 8-bit weights and float activations are always
            rounded to nearest. Weights that an earlier pass has rounded keep their codes.
        damping: Share of the mean input energy that GPTQ adds to the energy of each channel.
        activation_order: Whether GPTQ rounds the columns with the largest inputs first.
    """

    name: ClassVar[str] = "quantize-linears"
    tier: ClassVar[Tier] = Tier.LOSSY
    requires: ClassVar[Stage] = Stage.QUANTIZED
    establishes: ClassVar[Stage] = Stage.QUANTIZED
    keeps_inputs: ClassVar[bool] = True

    weight_range: RangeSearch = RangeSearch.MINMAX
    activation_range: InputRange = InputRange.MINMAX
    symmetric: bool = False
    rounding: Rounding = Rounding.NEAREST
    damping: float = 0.01
    activation_order: bool = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.damping < math.inf:
            raise ConfigurationError(
                f"{self.name}: damping={self.damping} is not possible; choose a share of the mean input energy, "
                "such as 0.01"
            )

    def wants_moments(self, layer: LayerPlan) -> bool:
        """Whether GPTQ or AdaRound needs second moments: not for layers that only store their weight in 8 bits."""
        return self.rounding is not Rounding.NEAREST and layer.kind == "linear" and is_rounded(layer)

    def decides(self, name: str, layer: LayerPlan) -> bool:
        """Whether the pass quantizes a layer."""
        return layer.kind == "linear" and layer.weight_bits is not None

    def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
        if context.team is not None and self.rounding is not Rounding.NEAREST:
            self._round_on_ranks(graph, context, rewriter)
        for node in list(graph.nodes):
            if not _has_codes(node, context):
                continue
            layer = context.plan.layer(node.meta[LAYER])
            x, weight, bias = args(node).node("input"), args(node).node("weight"), args(node).bias
            total = plus_rows(node) if bias is None and layer.activation_bits is not None else None
            dtype = node.meta["val"].dtype
            w = quantized_weight(node, context, rewriter, self.weight_range, self.symmetric, self._rounder(layer))
            with rewriter.before(node if total is None else total):
                if layer.activation_bits is None:
                    grid = w.codes, w.scale, w.zero_point, w.format, layer.group_size
                    arguments = (*grid, layer.shape[1], dtype, *optional(w.global_scale))
                    values = rewriter.call(
                        torch.ops.fxquant.dequantize_weight.default, arguments, [weight, node], layer=True
                    )
                    rewriter.redirect(node, weight, values)
                    continue
                q = quantized_input(node, x, context, rewriter, self.activation_range)
                if total is not None:
                    bias = args(total).other
                factors = q.codes, q.scale, q.zero_point, w.codes, w.scale, w.zero_point, bias, q.format, w.format
                outer = optional(q.global_scale, w.global_scale)
                new = rewriter.call(
                    torch.ops.fxquant.linear.default,
                    (*factors, layer.group_size, dtype, *outer),
                    sources=[node],
                    layer=True,
                )
            rewriter.replace(node if total is None else total, new)
            if total is not None:
                rewriter.erase(node)

    def _round_on_ranks(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
        linears = [node for node in graph.nodes if _has_codes(node, context)]

        def round_one(node: fx.Node) -> QuantizedWeight:
            rounder = self._rounder(context.plan.layer(node.meta[LAYER]))
            assert rounder is not None
            return rounded_weight(node, rounder, context, rewriter, self.weight_range, self.symmetric)

        nodes = unrounded(linears, context, rewriter, is_rounded)
        round_on_ranks(nodes, context, rewriter, round_one)
        for node in nodes:
            drop_used_moments(node.meta[LAYER], context)

    def _rounder(self, layer: LayerPlan) -> Rounder | None:
        if self.rounding is Rounding.NEAREST or not is_rounded(layer):
            return None
        return AdaRound() if self.rounding is Rounding.ADAROUND else GPTQ(self.damping, self.activation_order)


def _has_codes(node: fx.Node, context: PassContext) -> bool:
    """Whether a node is a linear that gets codes, and has none yet."""
    if node.target is not torch.ops.aten.linear.default or LAYER not in node.meta:
        return False
    return context.plan.layer(node.meta[LAYER]).weight_bits is not None and not is_quantized(args(node).node("weight"))
