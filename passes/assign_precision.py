"""Decide the bit widths of every layer."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxquant.attention import Attention, find_attentions, not_by_sample
from fxquant.capture import LAYER, stored_weight
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.stages import Stage
from fxquant.pipeline import Pass, Tier, register_pass
from fxquant.plan import AttentionPlan, LayerPlan, Plan
from fxquant.precision import FLOAT, Precision, overridden, precision_of, roles
from fxquant.products import find_products


class Products(enum.Enum):
    """In what the two matrix products of attention compute."""

    FLOAT = "float"
    QUANTIZED = "quantized"
    """In the bits of the activations; see :class:`~fxquant.passes.quantize_attention.QuantizeAttention`."""


@register_pass
@dataclass(frozen=True)
class AssignPrecision(Pass):
    """Write into the plan, for every linear, convolution and table, its role and its bit widths, and for attentions.

    The graph stays as it is. Layers and attentions that the plan knows already keep what it says.

    Attributes:
        precision: Bits of the layers that are quantized, such as ``w4a8`` or ``w4a16-g64``.
        layers: Which are: ``default``, ``blocks`` or ``all``; see :func:`fxquant.precision.precision_of`.
        overrides: Exceptions by name pattern, ``transformer_blocks.0.*=w8a8;proj_out=float``.
        attention: Whether the matrix products of attention are quantized too, at the bits of the activations. An
            override that fits the attention's own name, the path of its module, decides for it alone.
    """

    name: ClassVar[str] = "assign-precision"
    tier: ClassVar[Tier] = Tier.EXACT
    requires: ClassVar[Stage] = Stage.OBSERVED
    establishes: ClassVar[Stage] = Stage.CAPTURED

    precision: str = "w8a8"
    layers: str = "default"
    overrides: str = ""
    attention: Products = Products.FLOAT

    def __post_init__(self) -> None:
        precision_of("", "block", Precision.parse(self.precision), self.layers, self.overrides)

    def run(self, graph: fx.Graph, plan: Plan, rewriter: Rewriter) -> None:
        default = Precision.parse(self.precision)
        role_of = roles(graph)
        for product in find_products(graph):
            plan.products.setdefault(product.name, product.reason)
        for node in graph.nodes:
            if LAYER not in node.meta or node.meta[LAYER] in plan.layers:
                continue
            name = node.meta[LAYER]
            kind = _kind(node)
            weight = stored_weight(node)
            assert weight is not None
            chosen = precision_of(name, role_of[name], default, self.layers, self.overrides)
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
                reason=self._reason(name, kind, role_of[name]) if chosen.weight_bits is None else None,
            )
        timestep = next((n for n in graph.nodes if n.op == "placeholder" and n.target == plan.timestep), None)
        for found in find_attentions(graph):
            if found.name not in plan.attentions:
                plan.attentions[found.name] = self._attention(found, default, timestep)

    def _reason(self, name: str, kind: str, role: str) -> str:
        """Why a layer is kept in float."""
        if kind == "embedding":
            if self.layers == "default":
                return "its table is looked up several times a sample"
            return f"layers={self.layers} keeps tables in float"
        if overridden(name, self.overrides) is not None:
            return "an override keeps it in float"
        if self.layers == "all" or role in ("block", "adaln"):
            return "the recipe keeps layers in float"
        return f"layers={self.layers} keeps layers of role {role} in float; layers=all quantizes them"

    def _attention(self, found: Attention, default: Precision, timestep: fx.Node | None) -> AttentionPlan:
        if self.attention is Products.FLOAT:
            return AttentionPlan(None, reason="the recipe keeps attention in float")
        chosen = overridden(found.name, self.overrides) or default
        if chosen.activation_bits is None:
            return AttentionPlan(None, reason="its activations are to stay float")
        reason = found.reason or not_by_sample(found, timestep)
        return AttentionPlan(None if reason else chosen.activation_bits, reason=reason)


def _kind(node: fx.Node) -> str:
    name = str(node.target)
    return "embedding" if "embedding" in name else "conv" if "conv" in name else "linear"
