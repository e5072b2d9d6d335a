"""Learn how weights are rounded and inputs scaled, block by block, so that each block's output stays what it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import fx

from fxquant.errors import CalibrationError, ConfigurationError
from fxquant.ir.meta import LAYER
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.stages import Stage, is_replayed
from fxquant.numerics.finite import require_finite
from fxquant.numerics.rounding.soft import Hardening, SoftWeight
from fxquant.numerics.weights import weight_grid
from fxquant.passes._quantization import InputRange, RangeSearch, decide_range, importance_of, is_rounded
from fxquant.pipeline.pipeline import Pass, Tier, register_pass
from fxquant.planning.plan import Plan
from fxquant.reconstruction.engine import reconstruct
from fxquant.reconstruction.learn import Settings


@register_pass
@dataclass(frozen=True)
class ReconstructBlocks(Pass):
    """Write into the plan the codes of weights and the ranges of inputs that keep each block's output as it was.

    The graph stays as it is; ``quantize-linears``, which comes next, takes codes and ranges from the plan.

    BRECQ (arXiv 2102.05426) with AdaRound (arXiv 2004.10568), as Q-Diffusion and PTQ4DiT use them: block after block,
    the error ``|block(x) - block_quantized(x')|^2`` is minimized over whether each weight is rounded up or down, and
    over the steps of the inputs' grids. x is what the float model brings to the block, x' what the blocks before it
    bring, quantized as they were learned. What lies between blocks is learned likewise. Convolutions, attention
    products and what is only stored in 8 bits count as float. A block that learning does not improve keeps what
    rounding to nearest gives.

    The papers' setting is 20,000 iterations of 32 samples. Memory: about three times ``samples`` outputs of a block,
    and the weights of one block four times, in float32. What is finished goes into the folder ``resume=`` of
    :func:`fxquant.compile`, a file a block, from which a run that was cut off goes on.

    Attributes:
        iterations: Steps of Adam a block.
        samples: Most samples of calibration calls that are kept to learn from.
        batch: Samples a step.
        weight_range: How the range of a weight grid is found, as in ``quantize-linears``.
        activation_range: The same for inputs; it is where learning begins.
        symmetric: Whether weight grids are symmetric about 0.
        rounding_rate: Rate of Adam for roundings.
        step_rate: Rate of Adam for steps of inputs, as a share of the step; it falls to 0 along a cosine.
        regularizer: Weight of what drives roundings to a code, in units in which rounding a weight to nearest costs 1.
        warm_up: Share of the iterations before the regularizer sets in.
        seed: Of the minibatches.
    """

    name: ClassVar[str] = "reconstruct-blocks"
    tier: ClassVar[Tier] = Tier.EXACT
    requires: ClassVar[Stage] = Stage.TRANSFORMED
    establishes: ClassVar[Stage] = Stage.CAPTURED

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
                raise ConfigurationError(f"{self.name}: {what}={number} leaves nothing to learn from")

    def wants_samples(self) -> int:
        """Those that it learns from."""
        return self.samples

    def run(self, graph: fx.Graph, plan: Plan, rewriter: Rewriter) -> None:
        layers = [node for node in graph.nodes if _is_learned(node, plan)]
        if is_replayed(rewriter.module) or all(node.meta[LAYER] in plan.codes for node in layers):
            return
        if not plan.inputs:
            raise CalibrationError(
                f"{self.name} learns from calibration calls, and there are none of this kind; pass calibrate= to "
                "fxquant.compile. A plan alone does not hold them: to use what was learned, load the checkpoint"
            )
        soft: dict[fx.Node, Callable[[], SoftWeight]] = {}
        for node in layers:
            if plan.layer(node.meta[LAYER]).activation_bits is not None:
                decide_range(node, node.args[0], plan, rewriter, self.activation_range)
            soft[node] = partial(self._soft_weight, node, plan, rewriter)
        reconstruct(rewriter.module, plan, soft, self._settings(), str(self), rewriter.progress)

    def _soft_weight(self, node: fx.Node, plan: Plan, rewriter: Rewriter) -> SoftWeight:
        name = node.meta[LAYER]
        layer, weight = plan.layer(name), rewriter.tensor(node.args[1]).detach().to(torch.float32)
        require_finite(weight, f"the weight of layer {name}")
        assert layer.weight_bits is not None
        searched = self.weight_range is not RangeSearch.MINMAX
        scale, zero_point = weight_grid(
            weight,
            bits=layer.weight_bits,
            group_size=layer.group_size,
            symmetric=self.symmetric,
            method=self.weight_range.value,
            importance=importance_of(name, plan, weight.device) if searched else None,
        )
        return SoftWeight(weight, scale, zero_point, layer.weight_bits, layer.group_size)

    def _settings(self) -> Settings:
        hardening = Hardening(self.iterations, self.regularizer, self.warm_up)
        return Settings(hardening, self.batch, self.rounding_rate, self.step_rate, self.seed)


def _is_learned(node: fx.Node, plan: Plan) -> bool:
    if node.target is not torch.ops.aten.linear.default or LAYER not in node.meta:
        return False
    weight = node.args[1]
    return isinstance(weight, fx.Node) and weight.op == "get_attr" and is_rounded(plan.layer(node.meta[LAYER]))
