"""Inserts the ops of a Python function into a graph, and infers shapes again where an argument changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from fxquant.errors import PassError
from fxquant.ir.proofs import prove

if TYPE_CHECKING:
    from fxquant.ir.rewriter import Rewriter


def inline(
    rewriter: Rewriter,
    function: Callable[..., Any],
    arguments: Sequence[Any],
    sources: Sequence[fx.Node],
    layer: bool = False,
) -> Any:
    """Trace a small function of tensors, and add its ops to the graph at the place where new nodes go.

    ::

        with rewriter.before(node):
            low = rewriter.inline(lambda x, a, b: (x @ a) @ b, [x, down, up], sources=[node])

    The function is run once on tensors without values, of the shapes and dtypes of the arguments, with the batch size
    open. It may call torch functions and read sizes, but no values. A tensor that is not an argument has to be added
    by :meth:`Rewriter.constant` and passed as an argument.

    Args:
        rewriter: Of the graph.
        function: Takes as many arguments as given and returns a tensor, or a tuple or list of tensors.
        arguments: Nodes of the graph; everything else is given to the function as it is.
        sources: The nodes that the new nodes are made from.
        layer: Whether the new nodes do the work of the layer of their sources, as in :meth:`Rewriter.call`.

    Returns:
        The node of the result; a tuple of nodes if the function returns several.

    Raises:
        PassError: If the function cannot be traced.
    """
    nodes = [argument for argument in arguments if isinstance(argument, fx.Node)]
    called = getattr(function, "__name__", "the function")

    def of_tensors(*tensors: Tensor) -> list[Any]:
        given = iter(tensors)
        result = function(*(next(given) if isinstance(one, fx.Node) else one for one in arguments))
        return list(result) if isinstance(result, (tuple, list)) else [result]

    try:
        traced = make_fx(of_tensors, tracing_mode="symbolic", pre_dispatch=True, _allow_non_fake_inputs=True)(
            *(node.meta["val"] for node in nodes)
        )
    except Exception as error:  # Whatever the function raises, maybe without a word.
        why = ": ".join((type(error).__name__, *str(error).splitlines()[:1]))
        raise PassError(f"{rewriter.pass_name}: {called} cannot be traced: {why}") from error
    made: dict[fx.Node, Any] = {}
    inputs = iter(nodes)
    result: list[Any] = []
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            made[node] = next(inputs)
        elif node.op == "get_attr":
            raise PassError(
                f"{rewriter.pass_name}: {called} reads a tensor that is not an argument; add it by Rewriter.constant, "
                "and pass that node as an argument"
            )
        elif node.op == "output":
            result = list(map_arg(node.args[0], made.__getitem__))
        else:
            given, named = map_arg((node.args, dict(node.kwargs)), made.__getitem__)
            made[node] = rewriter.call(node.target, given, sources, layer=layer, kwargs=named)
    if not all(isinstance(one, fx.Node) for one in result):
        raise PassError(f"{rewriter.pass_name}: {called} does not return tensors")
    return result[0] if len(result) == 1 else tuple(result)


def infer_again(rewriter: Rewriter, start: fx.Node) -> None:
    """Infer the value of a node whose arguments changed, and the values that follow from it, as far as they change.

    Raises:
        PassError: If the op of the node does not accept its arguments.
    """
    changed = set[fx.Node]()
    node = start
    while node.op != "root":
        if node is start or (node.op == "call_function" and not changed.isdisjoint(node.all_input_nodes)):
            try:
                value = rewriter.infer(node)
            except Exception as error:  # Whatever the op raises.
                if node is not start:  # It may be about to be replaced; if not, verification reports it.
                    return
                raise PassError(
                    f"{rewriter.pass_name}: {node.target} does not accept the arguments of node {node.name}: {error}"
                ) from error
            if _text(value) != _text(node.meta.get("val")):
                node.meta["val"] = value
                prove(node)
                changed.add(node)
            elif node is start:
                return
        node = node.next


def _text(value: Any) -> str:
    """Shapes, strides and dtypes as text: comparing open sizes as numbers would fix them."""
    parts = []
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            strides = leaf.stride() if leaf.layout is torch.strided else ()
            parts.append(f"{leaf.dtype} {list(leaf.shape)} {list(strides)} {leaf.device}")
        else:
            parts.append(repr(leaf))
    return "; ".join(parts)
