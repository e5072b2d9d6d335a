"""Moves branches of low rank into the kernels around the linear that they stand beside."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxquant.backends.native.compiled.ops import inner_columns
from fxquant.backends.native.fusions import through_views, view_again
from fxquant.backends.native.library import FLOATS
from fxquant.backends.native.tensors import by_sample, only_reader
from fxquant.ir.arguments import args, item_of
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


def write_values(graph: fx.Graph, rewriter: Rewriter) -> None:
    """Let linears and attentions write codes and bfloat16 values, where branches in bfloat16 read their results.

    Before::

        x = fxquant_native.vnni_linear(...)
        codes, inner = fxquant_native.quantize_down(x, s, z, 255, [a], True)

    After::

        codes, values = fxquant_native.vnni_linear_values(..., s, z, 255, ...)
        inner = fxquant_native.down(values, [a])

    The codes are those of the float32 values. Views may be between the two.

    Args:
        graph: The graph, with the ops around linears and attentions fused into them.
        rewriter: The rewriter of the graph.
    """
    for node in list(graph.nodes):
        if node.target is native.quantize_down.default and args(node).bf16:
            _write_values(node, rewriter)


_WITH_VALUES = {
    native.vnni_linear.default: native.vnni_linear_values.default,
    native.bf16_attention.default: native.bf16_attention_values.default,
}


def _write_values(node: fx.Node, rewriter: Rewriter) -> None:
    given = args(node)
    scale = given.node("scale")
    if not by_sample(scale):
        return
    views, factor, source = through_views(given.x, scale)
    if source is None or source.target not in _WITH_VALUES or factor != 1.0 or args(source).out_scale is not None:
        return
    changed: dict[str, Any] = {"out_scale": scale, "out_zero_point": given.zero_point, "qmax": given.qmax}
    if source.target is native.vnni_linear.default:
        if args(source).gate or args(source).residual:
            return
    else:
        changed["out_dtype"] = None  # It writes float32 for `quantize_down`, and now none.
    with rewriter.before(node):  # The grid, perhaps computed from the timestep, is known here.
        both = rewriter.call(_WITH_VALUES[source.target], args(source).replaced(**changed), [source, node], layer=True)
        parts = [rewriter.call(operator.getitem, (both, part), [source, node], layer=True) for part in (0, 1)]
        codes, values = (view_again(part, views, rewriter) for part in parts)
        inner = rewriter.call(native.down.default, (values, given.downs), [node], layer=True)
    for reader in list(node.users):
        rewriter.replace(reader, (codes, inner)[item_of(reader)])
    for old in (node, *views, source):
        rewriter.erase(old)
