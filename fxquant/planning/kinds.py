"""Finds the purpose of each layer from the graph, without names of modules or a table of models."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import fx

from fxquant.errors import PassError
from fxquant.ir.meta import LAYER
from fxquant.planning.precision import roles

aten = torch.ops.aten

QKV, OUTPUT, FIRST, SECOND, OTHER = (
    "q, k, v",
    "attention output",
    "first feed-forward",
    "second feed-forward",
    "other",
)
KINDS = (QKV, OUTPUT, FIRST, SECOND, OTHER)
"""The kinds of linears of transformer blocks."""

_ATTENTION = (
    aten.scaled_dot_product_attention.default,
    aten.softmax.int,
    aten._softmax.default,
    aten.matmul.default,
    aten.bmm.default,
)
_ACTIVATIONS = (aten.gelu.default, aten.silu.default, aten.relu.default)


def kinds(graph: fx.Graph) -> dict[str, str]:
    """The kind of each linear, by layer name.

    The input and the result of a linear are followed to the next linears. A linear that reads a result of attention is
    its output projection, even if it also reads the feed-forward part. A linear that reads the result of an activation
    function is a second feed-forward linear. A linear whose result goes into attention makes q, k or v. A linear whose
    result goes into an activation function, or is multiplied by the result of one, is a first feed-forward linear.
    """
    found = {}
    for node in graph.nodes:
        if LAYER in node.meta and node.target is aten.linear.default:
            before = set(_reach(node.args[0], lambda other: other.all_input_nodes))
            after = [other for user in node.users for other in _reach(user, lambda other: list(other.users))]
            found[node.meta[LAYER]] = _kind(before, after)
    return found


def layer_kinds(graph: fx.Graph) -> dict[str, str]:
    """The kind of every layer of a float graph, by its name.

    Linears of blocks have one of :data:`KINDS`, as :func:`kinds` finds it. Other layers have their role: ``adaln`` for
    a linear that makes modulation vectors from the condition, ``embedder``, ``patch`` or ``final``; a convolution in a
    block has the kind ``other``.
    """
    linears = kinds(graph)
    return {name: linears.get(name, OTHER) if role == "block" else role for name, role in roles(graph).items()}


def layer_kind(node: fx.Node) -> str:
    """The kind of one layer; for many layers call :func:`layer_kinds` once.

    Raises:
        PassError: If the node is not a layer.
    """
    if LAYER not in node.meta:
        raise PassError(
            f"node {node.name} is not a layer; layers are linears, convolutions and embeddings with a weight"
        )
    return layer_kinds(node.graph)[str(node.meta[LAYER])]


def _kind(before: Iterable[fx.Node], after: Iterable[fx.Node]) -> str:
    sources = {node.target for node in before}
    if not sources.isdisjoint(_ATTENTION):
        return OUTPUT
    if not sources.isdisjoint(_ACTIVATIONS):
        return SECOND
    readers = list(after)
    if any(node.target in _ATTENTION for node in readers):
        return QKV
    gated = (node for reader in readers if reader.target is aten.mul.Tensor for node in reader.all_input_nodes)
    if any(node.target in _ACTIVATIONS for node in (*readers, *gated)):
        return FIRST
    return OTHER


def _reach(start: fx.Node, following: Callable[[fx.Node], list[fx.Node]]) -> list[fx.Node]:
    """The nodes from ``start`` on, up to linears, convolutions and norms."""
    seen: dict[fx.Node, None] = {}
    left = [start]
    while left:
        node = left.pop()
        ends = LAYER in node.meta or node.target in (aten.layer_norm.default,) or node.op in ("placeholder", "output")
        if node not in seen and not ends:
            seen[node] = None
            left += following(node)
    return list(seen)
