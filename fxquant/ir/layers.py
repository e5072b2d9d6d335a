"""Layers of a graph: ops with a stored weight, and the casts between the weight and the op."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxquant.ir.arguments import args, source_of
from fxquant.ir.meta import LAYER, PROVENANCE
from fxquant.ir.names import base_name
from fxquant.ir.places import Origin

LAYER_OPS = frozenset[Any](
    {
        torch.ops.aten.linear.default,
        torch.ops.aten.conv1d.default,
        torch.ops.aten.conv2d.default,
        torch.ops.aten.conv3d.default,
        torch.ops.aten.conv1d.padding,
        torch.ops.aten.conv2d.padding,
        torch.ops.aten.conv3d.padding,
        torch.ops.aten.embedding.default,
    }
)
"""The ops that are layers if their weight is stored: their argument ``weight``."""


_CASTS = ("to", "_to_copy", "type_as", "detach", "alias", "contiguous", "clone")
_CAST_OPS = (
    *(torch.ops.aten.to.dtype, torch.ops.aten.to.device, torch.ops.aten.to.dtype_layout),
    *(torch.ops.aten._to_copy.default, torch.ops.aten.type_as.default),
)


def stored_weight(node: fx.Node) -> fx.Node | None:
    """The parameter that is the weight of a layer, or that its weight is cast from; None if the weight is computed.

    A cast to integers or to 8 bits counts as computing the weight, whatever the result is cast to afterwards.
    """
    weight = args(node).weight
    while isinstance(weight, fx.Node) and weight.op == "call_function":
        if base_name(weight.target) not in _CASTS:
            return None
        if not is_wide_float(weight):
            return None
        weight = source_of(weight)
    return weight if isinstance(weight, fx.Node) and weight.op == "get_attr" else None


def is_cast(node: fx.Node) -> bool:
    """Whether a node casts to another dtype or device and does nothing else: no rounding to integers or to 8 bits."""
    source = args(node).self if node.target in _CAST_OPS else None
    return isinstance(source, fx.Node) and is_wide_float(node) and is_wide_float(source)


def parameter_of(node: fx.Node) -> fx.Node:
    """The source behind casts that have one reader each; the node itself if it is not such a cast."""
    while is_cast(node) and len(node.users) == 1:
        node = source_of(node)
    return node


def is_wide_float(node: fx.Node) -> bool:
    """Whether a value has a floating-point dtype of 16 bits or more."""
    dtype = node.meta["val"].dtype
    return bool(dtype.is_floating_point and dtype.itemsize > 1)


def layer_of(node: fx.Node) -> str | None:
    """The name of the layer whose work a node does, such as ``transformer_blocks.0.attn1.to_q``; None if of none."""
    name = node.meta.get(LAYER)
    return None if name is None else str(name)


def provenance_of(node: fx.Node) -> tuple[Origin, ...]:
    """Which passes made a node, and from which nodes; the oldest first. Empty for a node of the captured graph."""
    return tuple(node.meta.get(PROVENANCE, ()))


def layer_name(target: str) -> str:
    """The name of the layer whose weight has this name."""
    return target.removesuffix(".weight")
