"""Moves branches of low rank into the linear that they stand beside."""

from __future__ import annotations

import torch
from torch import fx

from fxquant.backends.native.gpu.products import MOST_RANK
from fxquant.backends.native.library import FLOATS
from fxquant.backends.native.tensors import only_reader
from fxquant.ir.arguments import args
from fxquant.ir.rewriter import Rewriter

aten, reference, native = torch.ops.aten, torch.ops.fxquant, torch.ops.fxquant_native


def lower(graph: fx.Graph, rewriter: Rewriter) -> None:
    """Add branches in the epilogue of linears, so that what follows a branch can be fused into the linear as well.

    Before::

        y = fxquant_native.triton_linear(codes, ...)
        w = fxquant.low_rank(y, x, a, b, None, strength)

    After::

        inner = mul(linear(x, a), strength)
        w = fxquant_native.triton_linear(codes, ..., inner, b)

    A branch stays an op of its own if the result of its linear is read elsewhere too, if it has an offset or a rank
    above :data:`fxquant.backends.native.gpu.products.MOST_RANK`, or if it follows another branch.

    Args:
        graph: The graph, with linears lowered and their neighbours not yet fused.
        rewriter: The rewriter of the graph.
    """
    for node in list(graph.nodes):
        if node.target is reference.low_rank.default and _fits(node):
            _fuse(node, rewriter)


def _fits(branch: fx.Node) -> bool:
    given = args(branch)
    y = given.node("y")
    if y.target is not native.triton_linear.default or only_reader(y) is not branch or given.offset is not None:
        return False
    if args(y).inner is not None or int(given.node("a").meta["val"].shape[0]) > MOST_RANK:
        return False
    return all(given.node(name).meta["val"].dtype in FLOATS for name in ("x", "a", "b"))


def _fuse(branch: fx.Node, rewriter: Rewriter) -> None:
    given = args(branch)
    linear = given.node("y")
    dtype = torch.promote_types(*(given.node(name).meta["val"].dtype for name in ("x", "a")))

    def cast(value: fx.Node) -> fx.Node:
        if value.meta["val"].dtype == dtype:
            return value
        return rewriter.call(aten.to.dtype, (value, dtype), [branch], layer=True)

    with rewriter.before(branch):
        x, a, b, strength = (cast(given.node(name)) for name in ("x", "a", "b", "strength"))
        inner = rewriter.call(aten.linear.default, (x, a), [branch], layer=True)
        inner = rewriter.call(aten.mul.Tensor, (inner, strength), [branch], layer=True)
        arguments = args(linear).replaced(inner=inner, up=b)
        new = rewriter.call(linear.target, arguments, [branch, linear], layer=True)
    rewriter.replace(branch, new)
    rewriter.erase(linear)
