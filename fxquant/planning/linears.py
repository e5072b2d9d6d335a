"""The linears of a graph that a plan quantizes, for passes that rewrite them before ``quantize-linears`` does."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import fx

from fxquant.ir.layers import stored_weight
from fxquant.ir.meta import LAYER, PROVENANCE
from fxquant.planning.decisions import LayerPlan
from fxquant.planning.plan import Plan


def linears_to_quantize(
    graph: fx.Graph, plan: Plan, decided: Container[str] = ()
) -> list[tuple[str, fx.Node, LayerPlan]]:
    """The linears whose weight and input the plan quantizes and that are float so far, in the order of the graph.

    Args:
        graph: A graph of the model.
        plan: Holds the bit widths; linears that it does not know are left out.
        decided: Names of linears that are listed whatever their bit widths: those that the pass took over before.

    Returns:
        For each: its name in the plan, its node ``aten.linear(input, weight, bias)``, and its plan. The weight is
        stored: ``stored_weight(node)`` is its ``get_attr`` node. The list does not change while the graph does.
    """
    found = []
    for node in graph.nodes:
        if node.target is not torch.ops.aten.linear.default or stored_weight(node) is None:
            continue
        layer = plan.layers.get(node.meta.get(LAYER, ""))
        if layer is None:
            continue
        if node.meta[LAYER] in decided or (layer.weight_bits is not None and layer.activation_bits is not None):
            found.append((str(node.meta[LAYER]), node, layer))
    return found


def changed_by(node: fx.Node, pass_name: str) -> bool:
    """Whether a pass made a node, or changed the tensor that it reads: so a pass finds what it has rewritten already.

    Args:
        node: A node; the weight of a layer is ``stored_weight(layer)``.
        pass_name: ``name`` of the pass.
    """
    return any(origin.pass_name == pass_name for origin in node.meta.get(PROVENANCE, ()))
