"""Moves branches of low rank into the kernels around the linear that they stand beside."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxquant.backends.native.compiled.ops import inner_columns
from fxquant.backends.native.library import FLOATS
from fxquant.backends.native.tensors import only_reader
from fxquant.ir.arguments import args
from fxquant.ir.rewriter import Rewriter

reference, native = torch.ops.fxquant, torch.ops.fxquant_native


def lower(graph: fx.Graph, rewriter: Rewriter, bf16: bool) -> None:
    """Compute the inner values of branches where x is quantized, and add the branches in the linears.

    Before::

        codes = fxquant_native.quantize(x, s, z, 255)
        y = fxquant_native.vnni_linear(codes, ...)
        w = fxquant.low_rank(y, x, a, b, None, strength)

    After::

        codes, inner = fxquant_native.quantize_down(x, s, z, 255, [a], bf16)
        w = fxquant_native.vnni_linear(codes, ..., inner, b, 0, strength)

    Branches beside several linears that read the same codes share the kernel. A branch stays an op of its own if the
    result of its linear is read elsewhere too, if it has an offset, or if it reads another value than its linear, as
    the second of two branches beside a linear does.

    Args:
        graph: The graph, with linears lowered and their neighbours not yet fused.
        rewriter: The rewriter of the graph.
        bf16: Multiply the branches in bfloat16 with float32 sums; otherwise in float32.
    """
    beside: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        codes = _codes_of(node) if node.target is reference.low_rank.default else None
        if codes is not None:
            beside.setdefault(codes, []).append(node)
    for codes, branches in beside.items():
        _fuse(codes, branches, rewriter, bf16)


def _codes_of(branch: fx.Node) -> fx.Node | None:
    """The quantization of the input of a branch and its linear, if the branch can be fused."""
    given = args(branch)
    y, x = given.node("y"), given.node("x")
    if y.target is not native.vnni_linear.default or only_reader(y) is not branch or given.offset is not None:
        return None
    codes = args(y).node("xq")
    if codes.target is not native.quantize.default or args(codes).x is not x or x.meta["val"].dtype not in FLOATS:
        return None
    a, b = given.node("a"), given.node("b")
    known = a.op == b.op == "get_attr" and a < codes
    return codes if known and a.meta["val"].dtype in FLOATS and b.meta["val"].dtype in FLOATS else None


def _fuse(codes: fx.Node, branches: list[fx.Node], rewriter: Rewriter, bf16: bool) -> None:
    places: dict[fx.Node, int] = {}
    width = 0
    for branch in branches:
        a = args(branch).node("a")
        if a not in places:
            places[a] = width
            width += inner_columns(int(a.meta["val"].shape[0]))
    with rewriter.before(codes):
        arguments = (*codes.args, list(places), bf16)
        both = rewriter.call(native.quantize_down.default, arguments, [codes], layer=True)
        parts: list[Any] = [rewriter.call(operator.getitem, (both, part), [codes], layer=True) for part in (0, 1)]
    rewriter.replace(codes, parts[0])
    for branch in branches:
        given = args(branch)
        linear = given.node("y")
        arguments = args(linear).replaced(
            inner=parts[1], up=given.b, inner_from=places[given.node("a")], strength=given.strength
        )
        with rewriter.before(branch):
            new = rewriter.call(linear.target, arguments, [branch, linear], layer=True)
        rewriter.replace(branch, new)
        rewriter.erase(linear)
