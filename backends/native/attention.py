"""Finds attentions of codes in a graph, for every set of kernels that has an attention kernel."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from fxquant.backends.native.library import FLOATS
from fxquant.backends.native.tensors import only_reader
from fxquant.ir.rewriter import Rewriter

aten, reference, native = torch.ops.aten, torch.ops.fxquant, torch.ops.fxquant_native

TO_VALUES = (1, 2)
"""Axes to swap in the kernels' result, which has tokens before heads."""

_HIGHEST = {native.quantize.default: 3, reference.quantize.default: 4}  # Position of the highest code.


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
    probabilities, p_scale, p_zero_point, v, v_scale, v_zero_point, dtype = node.args
    if not isinstance(probabilities, fx.Node) or probabilities.target not in _HIGHEST:
        return
    if dtype not in FLOATS or not _has_heads(v):
        return
    softmax, qmax = probabilities.args[0], probabilities.args[_HIGHEST[probabilities.target]]
    if not (_is_call(softmax, aten.softmax.int) or _is_call(softmax, aten._safe_softmax.default)):
        return
    assert isinstance(softmax, fx.Node)
    if softmax.args[1] not in (-1, 3) or not _private(softmax, probabilities):
        return
    scores, mask, negated = _unmasked(softmax.args[0])
    if not _is_call(scores, reference.matmul.default) or not is_mask(mask):
        return
    assert isinstance(scores, fx.Node)
    q, q_scale, q_zero_point, turned, k_scale, k_zero_point, inner = scores.args
    if not _has_heads(q) or inner == torch.float64 or not _is_call(turned, aten.transpose.int):
        return
    assert isinstance(turned, fx.Node)
    axes: tuple[Any, ...] = turned.args[1:]
    if {axis % 4 for axis in axes} != {2, 3}:
        return
    parts: list[Any] = [q, turned.args[0], v]
    if most_channels is not None and any(part.meta["val"].shape[-1] > most_channels for part in parts):
        return
    with rewriter.before(node):
        if negated:
            mask = rewriter.call(aten.logical_not.default, (mask,), [node])
        elif mask is not None:
            mask = rewriter.call(aten.to.dtype, (mask, torch.float32), [node])
        if read is not None:
            parts = [rewriter.call(read, (part,), [part]) for part in parts]
        q, k, v = parts
        grids = (q, q_scale, q_zero_point, k, k_scale, k_zero_point, v, v_scale, v_zero_point)
        rest = (mask, p_scale, p_zero_point, qmax, None, None, 255, dtype)
        new = rewriter.call(op, (*grids, *rest), [node])
        result = rewriter.call(aten.transpose.int, (new, *TO_VALUES), [node])
    replace(node, result, rewriter)


def replace(node: fx.Node, result: fx.Node, rewriter: Rewriter) -> None:
    """Replace an attention by a result, which keeps the metadata of the attention."""
    for key in node.meta.keys() - result.meta.keys():
        result.meta[key] = node.meta[key]
    rewriter.replace(node, result)


def _unmasked(node: Any) -> tuple[Any, Any, bool]:
    """Scores, their mask, and whether the mask is true for keys that are not seen."""
    if _is_call(node, aten.masked_fill.Scalar) and node.args[2] == -math.inf and only_reader(node) is not None:
        return node.args[0], node.args[1], True
    if _is_call(node, aten.add.Tensor) and not node.kwargs and only_reader(node) is not None:
        scores, mask = node.args
        if isinstance(mask, fx.Node) and mask.meta["val"].is_floating_point():
            return scores, mask, False
    return node, None, False


def is_mask(mask: Any) -> bool:
    """Whether kernels take this mask: None, a bool mask of the seen keys, or a float mask added to the scores."""
    if mask is None:
        return True
    value = mask.meta["val"]
    return value.dim() <= 4 and (value.dtype == torch.bool or value.is_floating_point())


def _has_heads(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.meta["val"].dim() == 4


def _is_call(node: Any, target: object) -> bool:
    return isinstance(node, fx.Node) and node.target is target


def _private(*nodes: fx.Node) -> bool:
    return all(only_reader(node) is not None for node in nodes)
