"""Make calibration visible in the graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxquant.capture import LAYER
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.stages import Stage
from fxquant.pipeline import Pass, Tier, register_pass
from fxquant.plan import LayerPlan, Plan
from fxquant.timesteps import timestep_input


@register_pass
@dataclass(frozen=True)
class InsertObservers(Pass):
    """Put ``fxquant::observe`` on every value that a layer with quantized activations reads.

    Before::

        q = linear(x, wq); k = linear(x, wk)

    After::

        x_observed = observe(x, timestep, "to_q", -1); q = linear(x_observed, wq); k = linear(x_observed, wk)

    Layers that read one value share an observer, keyed by the first of them. The channel axis is the last, for
    convolutions the second. Observers return their input, so the output keeps its bits.

    Attributes:
        weight_only: Whether linears with quantized weights and float activations are observed too, as rounding by their
            inputs needs it.
    """

    name: ClassVar[str] = "insert-observers"
    tier: ClassVar[Tier] = Tier.EXACT
    requires: ClassVar[Stage] = Stage.CAPTURED
    establishes: ClassVar[Stage] = Stage.OBSERVED

    weight_only: bool = False

    def run(self, graph: fx.Graph, plan: Plan, rewriter: Rewriter) -> None:
        observers: dict[tuple[fx.Node, int], fx.Node] = {}
        for node in list(graph.nodes):
            if LAYER not in node.meta or not self._observes(plan.layer(node.meta[LAYER])):
                continue
            layer = plan.layer(node.meta[LAYER])
            value, axis = node.args[0], 1 if layer.kind == "conv" else -1
            if value.target is torch.ops.fxquant.observe.default:
                continue
            observer = observers.get((value, axis))
            if observer is None:
                with rewriter.before(node):
                    observer = rewriter.call(
                        torch.ops.fxquant.observe.default,
                        (value, timestep_input(graph, plan.timestep), node.meta[LAYER], axis),
                        sources=[value],
                        name=f"{value.name}_observed",
                    )
                observers[value, axis] = observer
            layer.observed = str(observer.args[2])
            rewriter.redirect(node, value, observer)

    def _observes(self, layer: LayerPlan) -> bool:
        by_weight = self.weight_only and layer.kind == "linear" and layer.weight_bits is not None
        return layer.activation_bits is not None or by_weight
