"""Learn block by block how to round weights and scale inputs, so that each block's output is preserved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import fx

from fxquant.errors import CalibrationError, ConfigurationError
from fxquant.ir.arguments import args
from fxquant.ir.meta import LAYER
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.stages import Stage, is_replayed
from fxquant.numerics.finite import require_finite
from fxquant.numerics.rounding.soft import Hardening, SoftWeight
from fxquant.numerics.weights import weight_scales
from fxquant.passes._inputs import InputRange, decide_range
from fxquant.passes._quantization import importance_of
from fxquant.passes._rounders import RangeSearch, refuse_learned_rounding
from fxquant.pipeline.pipeline import Pass, Tier, register_pass
from fxquant.planning.context import PassContext
from fxquant.planning.decisions import LayerPlan
from fxquant.planning.linears import is_rounded
from fxquant.planning.plan import Plan
from fxquant.reconstruction.engine import reconstruct
from fxquant.reconstruction.learn import Settings


@register_pass
@dataclass(frozen=True)
class ReconstructBlocks(Pass):
    """Write weight codes and input ranges into the plan that preserve the output of each block.

    The graph does not change; ``quantize-linears``, which comes next, takes codes and ranges from the plan.

    BRECQ (arXiv 2102.05426) with AdaRound (arXiv 2004.10568), as in Q-Diffusion and PTQ4DiT. Block by block, the error
    ``|block(x) - block_quantized(x')|^2`` is minimized over the rounding of each weight, up or down, and over the steps
    of the inputs' grids. x is the input of the block in the float model. x' is its input from the preceding blocks,
    quantized as they were learned. Layers between blocks are learned in the same way. Convolutions, attention products
    and layers that are only stored in 8 bits count as float. A block that learning does not improve keeps the result of
    rounding to nearest.

    The papers use 20,000 iterations of 32 samples. Memory: about three times ``samples`` outputs of a block, and the
    weights of one block four times, in float32. Finished blocks are written to the folder ``resume=`` of
    :func:`fxquant.compile`, one file per block. An interrupted run continues from this folder.

    Attributes:
        iterations: Adam steps per block.
        samples: Maximum number of samples of calibration calls that are kept for learning.
        batch: Samples per step.
        weight_range: How the range of a weight grid is found, as in ``quantize-linears``.
        activation_range: The same for inputs; learning starts from this range.
        symmetric: Whether weight grids are symmetric about 0.
        rounding_rate: Adam's learning rate for roundings.
        step_rate: Adam's learning rate for steps of inputs, as a share of the step; it falls to 0 along a cosine.
        regularizer: Weight of the regularizer that drives roundings to a code, in units in which rounding a weight to
            nearest costs 1.
        warm_up: Share of the iterations before the regularizer starts.
        seed: Seed of the minibatches.
    """

    name: ClassVar[str] = "reconstruct-blocks"
    tier: ClassVar[Tier] = Tier.EXACT
    requires: ClassVar[Stage] = Stage.TRANSFORMED
    establishes: ClassVar[Stage] = Stage.CAPTURED
    keeps_inputs: ClassVar[bool] = True

    iterations: int = 20_000
    samples: int = 256
    batch: int = 32
    weight_range: RangeSearch = RangeSearch.MINMAX
    activation_range: InputRange = InputRange.MINMAX
    symmetric: bool = False
    rounding_rate: float = 1e-3
    step_rate: float = 4e-5
    regularizer: float = 10.0
    warm_up: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        self._settings()
        for what, number in (("samples", self.samples), ("batch", self.batch)):
            if number < 1:
                raise ConfigurationError(f"{self.name}: {what}={number} leaves nothing to learn from; choose 1 or more")

    def wants_samples(self) -> int:
        """The number of samples to learn from."""
        return self.samples

    def decides(self, name: str, layer: LayerPlan) -> bool:
        """Whether the pass learns the rounding of a layer."""
        return layer.kind == "linear" and layer.weight_bits is not None and layer.activation_bits is not None

    def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
        layers = [node for node in graph.nodes if _is_learned(node, context.plan)]
        if is_replayed(rewriter.module) or all(node.meta[LAYER] in context.codes for node in layers):
            return
        if not context.inputs:
            raise CalibrationError(
                f"{self.name} learns from calibration calls, and there are no calls of this kind; pass calibrate= to "
                "fxquant.compile. A plan does not hold these calls; to use what was learned, load the checkpoint"
            )
        soft: dict[fx.Node, Callable[[], SoftWeight]] = {}
        for node in layers:
            layer = context.plan.layer(node.meta[LAYER])
            if layer.activation_format is not None and layer.activation_bits is not None:
                raise ConfigurationError(
                    f"layer {node.meta[LAYER]}: {self.name} learns the steps of integer activations, and its input is "
                    f"{layer.activation_format}; choose integers for it, or another rounding (gptq)"
                )
            if layer.timesteps is not None and layer.timesteps.bits is not None:
                raise ConfigurationError(
                    f"layer {node.meta[LAYER]}: {self.name} learns steps for one number of bits, and its input has "
                    "bits for each bin of timesteps; leave out bin-bits, or choose another rounding (gptq)"
                )
            if layer.activation_bits is not None:
                decide_range(node, args(node).node("input"), context, rewriter, self.activation_range)
            soft[node] = partial(self._soft_weight, node, context, rewriter)
        reconstruct(rewriter.module, context, soft, self._settings(), str(self))

    def _soft_weight(self, node: fx.Node, context: PassContext, rewriter: Rewriter) -> SoftWeight:
        name = node.meta[LAYER]
        layer, weight = context.plan.layer(name), rewriter.tensor(args(node).weight).detach().to(torch.float32)
        require_finite(weight, f"the weight of layer {name}")
        assert layer.format_of_weight is not None
        refuse_learned_rounding(name, layer)
        searched = self.weight_range is not RangeSearch.MINMAX
        scales = weight_scales(
            weight,
            format=layer.format_of_weight.name,
            group_size=layer.group_size,
            symmetric=self.symmetric,
            method=self.weight_range.value,
            importance=importance_of(name, context, weight.device) if searched else None,
        )
        return SoftWeight(weight, scales, layer.format_of_weight.name, layer.group_size)

    def _settings(self) -> Settings:
        hardening = Hardening(self.iterations, self.regularizer, self.warm_up)
        return Settings(hardening, self.batch, self.rounding_rate, self.step_rate, self.seed)


def _is_learned(node: fx.Node, plan: Plan) -> bool:
    if node.target is not torch.ops.aten.linear.default or LAYER not in node.meta:
        return False
    return args(node).node("weight").op == "get_attr" and is_rounded(plan.layer(node.meta[LAYER]))
