"""The linears of a graph that a plan quantizes, for passes that rewrite them before ``quantize-linears`` does."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import torch
from torch import fx

from fxquant.ir.arguments import args
from fxquant.ir.layers import layer_of, provenance_of, stored_weight
from fxquant.planning.decisions import LayerPlan
from fxquant.planning.plan import Plan
from fxquant.planning.precision import Precision


@dataclass(frozen=True, eq=False)
class FloatLinear:
    """A linear that is still float: ``aten.linear(input, weight, bias)``.

    Attributes:
        name: Its name in the plan, such as ``transformer_blocks.0.attn1.to_q``.
        node: The node of the op.
        weight: The ``get_attr`` node of its stored weight, ``[out, in]``.
        plan: What was decided for it so far.
    """

    name: str
    node: fx.Node
    weight: fx.Node
    plan: LayerPlan

    @property
    def input(self) -> fx.Node:
        """The value that it reads."""
        return args(self.node).node("input")


def linears_to_quantize(graph: fx.Graph, plan: Plan, decided: Container[str] = ()) -> list[FloatLinear]:
    """The linears whose weight and input the plan quantizes and that are float so far, in the order of the graph.

    Args:
        graph: A graph of the model.
        plan: Holds the bit widths; linears that it does not know are left out.
        decided: Names of linears that are listed whatever their bit widths: those that the pass took over before.

    Returns:
        The linears. The list does not change while the graph does.
    """
    found = []
    for node in graph.nodes:
        weight = stored_weight(node) if node.target is torch.ops.aten.linear.default else None
        name = layer_of(node)
        if weight is None or name is None or name not in plan.layers:
            continue
        layer = plan.layers[name]
        if name in decided or (layer.weight_bits is not None and layer.activation_bits is not None):
            found.append(FloatLinear(name, node, weight, layer))
    return found


def is_rounded(layer: LayerPlan | Precision) -> bool:
    """Whether a weight is quantized for more than 8-bit storage: it has fewer bits, or its input is quantized."""
    return layer.weight_bits is not None and (layer.activation_bits is not None or layer.weight_bits < 8)


def rounded_linears(graph: fx.Graph, plan: Plan) -> list[FloatLinear]:
    """As :func:`linears_to_quantize`, with those whose input stays float if their weight has fewer than 8 bits."""
    return linears_to_quantize(graph, plan, {name for name, layer in plan.layers.items() if is_rounded(layer)})


def changed_by(node: fx.Node, pass_name: str) -> bool:
    """Whether a pass made a node, or changed the tensor that it reads: so a pass finds what it has rewritten already.

    Args:
        node: A node; for a layer, the node of its weight.
        pass_name: ``name`` of the pass.
    """
    return any(origin.pass_name == pass_name for origin in provenance_of(node))
