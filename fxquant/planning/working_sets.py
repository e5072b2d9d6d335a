"""Memory that a conversion needs at a time while other tensors lie in files: for one layer, and for one call."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxquant.ir.tensors import size_for
from fxquant.memory.bound import current
from fxquant.planning.decisions import LayerPlan
from fxquant.planning.plan import Plan

_FOLDED = 28
"""Bytes per element of a weight while a factor is folded into it: copies in its dtype and in float64."""
_ROUNDED = 17
"""Bytes per element while it is rounded: copies in float32, codes, and errors."""
_FACTORIZED = 13
"""Bytes per pair of input channels while second moments are factorized, in float64 and in float32."""
_FACTOR = 4
"""Bytes per pair of input channels of the factor."""


def working_set(layer: LayerPlan, moments: bool) -> int:
    """Bytes that folding into a layer and rounding it need at a time.

    Args:
        layer: The layer, with the shape of its weight.
        moments: Whether it is rounded by second moments of its input.
    """
    size, inputs = 1, layer.shape[1]
    for length in layer.shape:
        size *= length
    found = _FOLDED * size
    return max(found, _FACTORIZED * inputs**2, _FACTOR * inputs**2 + _ROUNDED * size) if moments else found


def largest_working_set(plan: Plan, moments: Collection[str]) -> tuple[str, int]:
    """The quantized layer that needs the most memory, and how many bytes; no layer and 0 if none is quantized.

    Args:
        plan: The plan.
        moments: The layers that are rounded by second moments.
    """
    sizes = {name: working_set(layer, name in moments) for name, layer in plan.quantized()}
    name = max(sizes, key=lambda name: sizes[name], default="")
    return name, sizes.get(name, 0)


def live_bytes(graph: fx.Graph, batch: int) -> int:
    """The most bytes of activations that are live at once while a graph runs.

    The bytes are those of the recorded shapes and dtypes. Inputs, parameters, and what an op needs besides its operands
    and its result are not counted. A view counts as the value that it is of.

    Args:
        graph: The graph; values are freed after the last node that reads them.
        batch: The batch size.
    """
    owners: dict[fx.Node, tuple[fx.Node, ...]] = {}  # The nodes whose memory a value lies in.
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        views = [owner for source in _viewed(node) for owner in owners.get(source, ())]
        owners[node] = tuple(dict.fromkeys(views)) or ((node,) if node.op == "call_function" else ())
        for owner in (owner for source in (node, *node.all_input_nodes) for owner in owners.get(source, ())):
            last[owner] = node
    ends: dict[fx.Node, list[fx.Node]] = {}
    for owner, node in last.items():
        ends.setdefault(node, []).append(owner)
    live, most = 0, 0
    for node in graph.nodes:
        live += _bytes(node, batch) if node in owners[node] else 0
        most = max(most, live)
        live -= sum(_bytes(owner, batch) for owner in ends.get(node, ()))
    return most


def _viewed(node: fx.Node) -> Iterator[fx.Node]:
    """The values of which the result of a node is a view, or an element."""
    if node.op != "call_function":
        return
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        yield from node.all_input_nodes  # An element of a tuple, or arithmetic of sizes.
        return
    if not any(returned.alias_info is not None for returned in schema.returns):
        return
    for argument, value in zip(schema.arguments, node.args, strict=False):
        if argument.alias_info is not None:
            yield from (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, fx.Node))


def _bytes(node: fx.Node, batch: int) -> int:
    values = [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]
    return sum(math.prod(size_for(size, batch) for size in value.shape) * value.dtype.itemsize for value in values)


def require_largest(plan: Plan, moments: Collection[str], graph: fx.Graph, batch: int) -> None:
    """Refuse a bound of the memory that is too small for the largest layer, or for the activations of a call.

    See :func:`largest_working_set` and :func:`live_bytes`.

    Args:
        plan: The plan.
        moments: The layers that are rounded by second moments.
        graph: The graph that runs in calibration.
        batch: The batch size of its calls; 0 if none is made.

    Raises:
        MemoryLimitError: Names the layer or the call, and a bound that would do.
    """
    bound = current()
    if bound is None:
        return
    (name, size), call = largest_working_set(plan, moments), live_bytes(graph, batch) if batch else 0
    if call > size:
        bound.require(call, f"one call of the model with {batch} samples")
    elif name:
        bound.require(size, f"layer {name}")
