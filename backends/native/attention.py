"""Finds attentions of codes in a graph, for every set of kernels that has an attention kernel."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from fxquant.backends.native.library import FLOATS
from fxquant.backends.native.tensors import only_reader
from fxquant.ir.arguments import args
from fxquant.ir.rewriter import Rewriter
from fxquant.numerics.formats import top_of

aten, reference, native = torch.ops.aten, torch.ops.fxquant, torch.ops.fxquant_native

TO_VALUES = (1, 2)
"""Axes to swap in the kernels' result, which has tokens before heads."""

_QUANTIZE = (native.quantize.default, reference.quantize.default)


def lower_codes(
    node: fx.Node, rewriter: Rewriter, op: torch._ops.OpOverload, read: Any = None, most_channels: int | None = None
) -> None:
    """Replace an attention of four axes by one op, matched from the product with v back to the product of q and k.

    An attention that does not match does not change.

    Args:
        node: A product of two activations, perhaps the product with v.
        rewriter: The rewriter of the graph.
        op: An op with the schema of ``fxquant_native::int8_attention``.
        read: An op with one argument that is applied to q, k and v first; None for no op.
        most_channels: The most channels per head that the op takes; None for any number.
    """
    mixed = args(node)
    probabilities, v, dtype = mixed.node("aq"), mixed.node("bq"), mixed.out_dtype
    if probabilities.target not in _QUANTIZE or dtype not in FLOATS or not _has_heads(v):
        return
    softmax = args(probabilities).node("x")
    if softmax.target not in (aten.softmax.int, aten._safe_softmax.default):
        return
    if args(softmax).dim not in (-1, 3) or not _private(softmax, probabilities):
        return
    scores, mask, negated = _unmasked(args(softmax).node("self"))
    if scores.target is not reference.matmul.default or not is_mask(mask):
        return
    scored = args(scores)
    q, turned = scored.node("aq"), scored.node("bq")
    if not _has_heads(q) or scored.out_dtype == torch.float64 or turned.target is not aten.transpose.int:
        return
    if {axis % 4 for axis in (args(turned).dim0, args(turned).dim1)} != {2, 3}:
        return
    parts = [q, args(turned).node("self"), v]
    if most_channels is not None and any(part.meta["val"].shape[-1] > most_channels for part in parts):
        return
    with rewriter.before(node):
        if negated:
            mask = rewriter.call(aten.logical_not.default, (mask,), [node], layer=True)
        elif mask is not None:
            mask = rewriter.call(aten.to.dtype, (mask, torch.float32), [node], layer=True)
        if read is not None:
            parts = [rewriter.call(read, (part,), [part], layer=True) for part in parts]
        q, k, v = parts
        left, right = (q, scored.a_scale, scored.a_zero_point), (k, scored.b_scale, scored.b_zero_point)
        softmaxed = (mixed.a_scale, mixed.a_zero_point, _top(probabilities))
        grids = (*left, *right, v, mixed.b_scale, mixed.b_zero_point, mask, *softmaxed)
        new = rewriter.call(op, (*grids, None, None, 255, dtype), [node], layer=True)
        result = rewriter.call(aten.transpose.int, (new, *TO_VALUES), [node], layer=True)
    replace(node, result, rewriter)


def replace(node: fx.Node, result: fx.Node, rewriter: Rewriter) -> None:
    """Replace an attention by a result, which keeps the metadata of the attention."""
    for key in node.meta.keys() - result.meta.keys():
        result.meta[key] = node.meta[key]
    rewriter.replace(node, result)


def _unmasked(node: fx.Node) -> tuple[fx.Node, fx.Node | None, bool]:
    """Scores, their mask, and whether the mask is true for keys that are not seen."""
    if only_reader(node) is None:
        return node, None, False
    if node.target is aten.masked_fill.Scalar and args(node).value == -math.inf:
        return args(node).node("self"), args(node).node("mask"), True
    if node.target is aten.add.Tensor and args(node).alpha == 1:
        scores, mask = args(node).self, args(node).other
        if isinstance(scores, fx.Node) and isinstance(mask, fx.Node) and mask.meta["val"].is_floating_point():
            return scores, mask, False
    return node, None, False


def is_mask(mask: fx.Node | None) -> bool:
    """Whether kernels take this mask: None, a bool mask of the seen keys, or a float mask added to the scores."""
    if mask is None:
        return True
    value = mask.meta["val"]
    return value.dim() <= 4 and (value.dtype == torch.bool or value.is_floating_point())


def _top(codes: fx.Node) -> int:
    """The highest code that a quantization makes."""
    is_reference = codes.target is reference.quantize.default
    return top_of(args(codes).format) if is_reference else int(args(codes).qmax)


def _has_heads(node: fx.Node) -> bool:
    return bool(node.meta["val"].dim() == 4)


def _private(*nodes: fx.Node) -> bool:
    return all(only_reader(node) is not None for node in nodes)
