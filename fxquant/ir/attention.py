"""Finds the attentions of a graph: their place, their name, and whether their matrix products can be quantized.

Two forms are known: ``scaled_dot_product_attention``, and a softmax over the last axis between two matrix products,
with any ops on single scores in between. Matching does not change the graph. A product of two activations that has
neither form is reported as well, with the reason why it stays float, so that no product is left out silently.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.ir.arguments import args
from fxquant.ir.dataflow import reached
from fxquant.ir.meta import LAYER
from fxquant.ir.names import base_name

aten = torch.ops.aten

ATTENTION = "fxquant_attention"
"""Key of ``node.meta`` of a quantized node: the name of the attention whose result the node yields."""

_CHANGES = "fxquant_value_changes"

SIDES = ("q", "k", "v")

_PRODUCTS: dict[Any, tuple[str, str]] = {
    aten.matmul.default: ("self", "other"),
    aten.bmm.default: ("self", "mat2"),
    aten.baddbmm.default: ("batch1", "batch2"),
}
"""Matrix products, and the names of their factors among the arguments."""

_SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
_CASTS = ("to", "_to_copy", "type_as", "clone", "contiguous", "dropout", "detach", "alias")
_VIEWS = ("view", "_unsafe_view", "reshape", "expand", "flatten", "unflatten", "squeeze", "unsqueeze")
_ON_SCORES = (
    *(*_CASTS, *_VIEWS, "add", "sub", "mul", "div", "masked_fill", "where", "tanh", "clamp"),
    *("maximum", "minimum", "softplus", "neg"),
)


@dataclass(frozen=True, eq=False)
class Operand:
    """One of the three values that an attention multiplies.

    Attributes:
        reader: The op that reads the value.
        argument: Name of the value among the arguments of that op.
        axis: Channel axis of the value: the last axis, or the second-to-last for transposed keys.
    """

    reader: fx.Node
    argument: str
    axis: int = -1

    @property
    def value(self) -> fx.Node:
        """The value."""
        return args(self.reader).node(self.argument)


@dataclass(frozen=True, eq=False)
class Attention:
    """One attention of a graph.

    Attributes:
        name: Path of its module, such as ``transformer_blocks.0.attn1``. The name of a second attention in the same
            module ends in ``@2``.
        output: The node of its result.
        operands: q, k and v; empty if the products cannot be quantized.
        scale: The factor by which the op itself multiplies q.
        reason: Why the products cannot be quantized, or None if they can.
    """

    name: str
    output: fx.Node
    operands: Mapping[str, Operand] = field(default_factory=dict)
    scale: float = 1.0
    reason: str | None = None


@dataclass(frozen=True, eq=False)
class ValueChange:
    """How a pass changed the value v that an attention mixes: v became ``factor * v + shift[bin]``.

    Attributes:
        factor: float64, broadcasts against v.
        shift: float64 ``[bins, ...]``, each row broadcasts against v.
        boundaries: Boundaries between bins of timesteps, ascending; one fewer than bins.
    """

    factor: Tensor
    shift: Tensor
    boundaries: tuple[float, ...] = ()


def note_change(reader: fx.Node, change: ValueChange) -> None:
    """Record on the reader of a mixed value that the value is no longer the one that calibration saw."""
    if (change.factor != 1).any() or (change.shift != 0).any():
        reader.meta[_CHANGES] = (*reader.meta.get(_CHANGES, ()), change)


def changes_of(reader: fx.Node) -> tuple[ValueChange, ...]:
    """The changes of the value since capture, the earliest change first."""
    return tuple(reader.meta.get(_CHANGES, ()))


def find_attentions(graph: fx.Graph) -> list[Attention]:
    """All attentions, and other products of two activations, in the order of the graph."""
    found: list[Attention] = []
    seen: Counter[str] = Counter()
    for node, (operands, scale, reason) in _candidates(graph):
        place = _module_of(node)
        seen[place] += 1
        if ATTENTION not in node.meta:  # Otherwise it is quantized already, but still counts.
            name = place if seen[place] == 1 else f"{place}@{seen[place]}"
            found.append(Attention(name, node, operands, scale, reason))
    return found


_Match = tuple[dict[str, Operand], float, str | None]


def attention_products(graph: fx.Graph) -> set[fx.Node]:
    """The matrix products that :func:`find_attentions` covers: those of the outputs and those of the scores."""
    matches, scores = _matches(graph)
    return {*matches, *scores}


def _candidates(graph: fx.Graph) -> Iterator[tuple[fx.Node, _Match]]:
    matches, scores = _matches(graph)
    # Filter after all matches are known: the product that makes the scores comes before the one that uses them.
    return ((node, match) for node, match in matches.items() if node not in scores)


def _matches(graph: fx.Graph) -> tuple[dict[fx.Node, _Match], set[fx.Node]]:
    matches: dict[fx.Node, _Match] = {}
    scores: set[fx.Node] = set()
    activations = reached(graph, lambda node: LAYER in node.meta)
    for node in graph.nodes:
        if node.target is aten.scaled_dot_product_attention.default:
            matches[node] = _fused(node)
        elif node.target in _PRODUCTS:
            factors = factors_of(node)
            softmax, why = _probabilities(factors[0])
            if softmax is not None:
                matches[node], used = _explicit(node, softmax, why)
                scores |= used
            elif activations.issuperset(factors):
                matches[node] = {}, 1.0, "it is a product of two activations, but no softmax attention"
        elif node.target is aten.einsum.default and sum(part in activations for part in node.all_input_nodes) > 1:
            matches[node] = (
                {},
                1.0,
                "it is written as an einsum; matmul, bmm and scaled_dot_product_attention are known",
            )
        elif ATTENTION in node.meta:
            matches[node] = {}, 1.0, None
    return matches, scores


def _fused(node: fx.Node) -> _Match:
    given = args(node)
    values = ("query", "key", "value")
    shapes = [given.node(name).meta["val"].shape for name in values]
    scale = given.scale
    reason = None
    if given.dropout_p != 0:
        reason = f"it drops out a share of {given.dropout_p} of its probabilities"
    elif min(map(len, shapes)) < 3:
        reason = "its values have fewer than three axes, so none of them is the batch"
    elif not isinstance(shapes[0][-1], int) or not isinstance(scale, (int, float, type(None))):
        reason = "its scale is not known before it runs"
    elif given.is_causal and not all(isinstance(shape[-2], int) for shape in shapes[:2]):
        reason = "it is causal over a number of tokens that is not known before it runs"
    elif given.enable_gqa and not all(isinstance(shape[-3], int) for shape in shapes):
        reason = "the number of its heads is not known before it runs"
    if reason is not None:
        return {}, 1.0, reason
    operands = {side: Operand(node, name) for side, name in zip(SIDES, values, strict=True)}
    return operands, float(1 / math.sqrt(shapes[0][-1]) if scale is None else scale), None


def _explicit(node: fx.Node, softmax: fx.Node, why: str | None) -> tuple[_Match, set[fx.Node]]:
    """The match, and the products that make its scores."""
    products = _scores(args(softmax).node("self"))
    rank = softmax.meta["val"].dim()
    if args(softmax).dim not in (-1, rank - 1):
        why = f"its softmax runs over axis {args(softmax).dim}, not over the keys"
    elif why is None and len(products) != 1:
        why = f"its scores come from {len(products)} matrix products that are known, not from one"
    elif why is None:
        product = products[0]
        left, right = _PRODUCTS[product.target]
        value = _PRODUCTS[node.target][1]
        operands = {"q": Operand(product, left), "k": Operand(product, right, -2), "v": Operand(node, value)}
        small = min(operand.value.meta["val"].dim() for operand in operands.values())
        why = _other_reader(product, node)
        if small < 3:
            why = "its values have fewer than three axes, so none of them is the batch"
        if why is None:
            return (operands, 1.0, None), {product}
    return ({}, 1.0, why), set(products)


def _probabilities(node: fx.Node) -> tuple[fx.Node | None, str | None]:
    """The softmax that a value comes from through casts and views, and why it cannot be used; None for each if none."""
    why = None
    while node.target not in _SOFTMAX:
        op, source = base_name(node.target), node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or op not in (*_CASTS, *_VIEWS):
            return None, None
        if op == "dropout" and args(node).train is not False:
            why = f"it drops out a share of {args(node).p} of its probabilities"
        if str(source.meta["val"].shape[-1:]) != str(node.meta["val"].shape[-1:]):
            why = "its probabilities are laid out anew between the softmax and the product"
        node = source
    return node, why


def _scores(value: fx.Node) -> list[fx.Node]:
    """The matrix products that a value comes from through ops on single elements."""
    found: dict[fx.Node, None] = {}
    todo, seen = [value], set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target in _PRODUCTS:
            found[node] = None
        elif base_name(node.target) in _ON_SCORES:
            todo += node.all_input_nodes
    return list(found)


def _other_reader(product: fx.Node, output: fx.Node) -> str | None:
    """Why the scores or probabilities must stay available, or None if only the attention reads them."""
    behind = {product}
    todo = [product]
    while todo:
        node = todo.pop()
        for user in node.users:
            if user is output or user in behind or base_name(user.target).startswith("sym_"):
                continue
            if user.target not in _SOFTMAX and base_name(user.target) not in _ON_SCORES:
                return f"{node.name}, from its scores, is also read by {user.name}"
            behind.add(user)
            todo.append(user)
    return None


def factors_of(product: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The factors of a matrix product."""
    left, right = _PRODUCTS[product.target]
    return args(product).node(left), args(product).node(right)


def _module_of(node: fx.Node) -> str:
    modules = [str(path) for path, _ in node.meta.get("nn_module_stack", {}).values()]
    return modules[-1] if modules and modules[-1] else "attention"


def not_by_sample(found: Attention, timestep: fx.Node | None) -> str | None:
    """Why the rows of q, k or v of an attention cannot be assigned to timesteps, or None if all of them can."""
    steps = None if timestep is None else timestep.meta["val"]
    if steps is None or steps.dim() != 1 or steps.shape[0] == 1:
        return None
    for side, operand in found.operands.items():
        batch, samples = operand.value.meta["val"].shape[0], steps.shape[0]
        known = samples if isinstance(samples, int) else samples.node.hint  # The size in the captured call.
        if isinstance(batch, int) and known and batch % known:
            return f"the leading axis of its {side} is not the batch"
    return None
