"""Decide the bit widths of every layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxquant.capture import LAYER
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.stages import Stage
from fxquant.pipeline import Pass, Tier, register_pass
from fxquant.plan import LayerPlan, Plan
from fxquant.precision import FLOAT, Precision, precision_of, roles


@register_pass
@dataclass(frozen=True)
class AssignPrecision(Pass):
    """Write into the plan, for every linear, convolution and table, its role and its bit widths.

    The graph stays as it is. Layers that the plan knows already keep what it says.

    Attributes:
        precision: Bits of the layers that are quantized, such as ``w4a8`` or ``w4a16-g64``.
        layers: Which are: ``default``, ``blocks`` or ``all``; see :func:`fxquant.precision.precision_of`.
        overrides: Exceptions by name pattern, ``transformer_blocks.0.*=w8a8;proj_out=float``.
    """

    name: ClassVar[str] = "assign-precision"
    tier: ClassVar[Tier] = Tier.EXACT
    requires: ClassVar[Stage] = Stage.OBSERVED
    establishes: ClassVar[Stage] = Stage.CAPTURED

    precision: str = "w8a8"
    layers: str = "default"
    overrides: str = ""

    def __post_init__(self) -> None:
        precision_of("", "block", Precision.parse(self.precision), self.layers, self.overrides)

    def run(self, graph: fx.Graph, plan: Plan, rewriter: Rewriter) -> None:
        default = Precision.parse(self.precision)
        role_of = roles(graph)
        for node in graph.nodes:
            if LAYER not in node.meta or node.meta[LAYER] in plan.layers:
                continue
            name = node.meta[LAYER]
            kind = _kind(node)
            weight = node.args[0 if kind == "embedding" else 1]
            chosen = precision_of(name, role_of[name], default, self.layers, self.overrides)
            if weight.op != "get_attr":
                chosen = FLOAT  # Its weight is computed in the graph: there is nothing to store in few bits.
            if kind == "embedding":  # The papers keep tables in float; 8 bits a row are a matter of size alone.
                one_row_a_sample = node.args[1].meta["val"].dim() == 1
                chosen = Precision(8, None) if self.layers == "default" and one_row_a_sample else FLOAT
            shape = weight.meta["val"].shape
            plan.layers[name] = LayerPlan(
                kind=kind,
                role=role_of[name],
                shape=[int(shape[0]), math.prod(int(size) for size in shape[1:])],
                weight_bits=chosen.weight_bits,
                activation_bits=chosen.activation_bits,
                group_size=chosen.group_size if kind == "linear" else 0,  # Groups are along a linear's input channels.
            )


def _kind(node: fx.Node) -> str:
    name = str(node.target)
    return "embedding" if "embedding" in name else "conv" if "conv" in name else "linear"
