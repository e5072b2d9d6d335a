"""Attention as one kernel: of float values in bfloat16, and of codes in integers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from fxquant.backends.native.library import FLOATS
from fxquant.backends.native.tensors import only_reader
from fxquant.ir.rewriter import Rewriter

aten, reference, native = torch.ops.aten, torch.ops.fxquant, torch.ops.fxquant_native

_TO_VALUES = (1, 2)  # Kernels return tokens before heads.


def lower(graph: fx.Graph, rewriter: Rewriter, floats: bool) -> None:
    """Rewrite attentions of four axes: those of codes, and if asked those of float values."""
    for node in list(graph.nodes):
        if node.target is reference.matmul.default:
            _lower_codes(node, rewriter)
        elif floats and node.target is aten.scaled_dot_product_attention.default:
            _lower_floats(node, rewriter)


def _lower_floats(node: fx.Node, rewriter: Rewriter) -> None:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    q, k, v, mask = given["query"], given["key"], given["value"], given.get("attn_mask")
    values = [part.meta["val"] for part in (q, k, v)]
    if any(value.dim() != 4 or value.dtype != values[0].dtype for value in values) or values[0].dtype not in FLOATS:
        return
    if given.get("dropout_p", 0.0) or not _is_mask(mask):
        return
    scale = given.get("scale")
    scale = 1 / math.sqrt(int(values[0].shape[-1])) if scale is None else scale
    if not isinstance(scale, float):
        return
    with rewriter.before(node):
        if mask is not None and mask.meta["val"].dtype != torch.bool:
            mask = rewriter.call(aten.to.dtype, (mask, torch.float32), [node])
        arguments = (q, k, v, mask, bool(given.get("is_causal")), scale, None, None, 255)
        new = rewriter.call(native.bf16_attention.default, arguments, [node])
        result = rewriter.call(aten.transpose.int, (new, *_TO_VALUES), [node])
    _replace(node, result, rewriter)


def _lower_codes(node: fx.Node, rewriter: Rewriter) -> None:
    """Matched from the product with v back to that of q and k; what does not match stays as it is."""
    probabilities, p_scale, p_zero_point, v, v_scale, v_zero_point, dtype = node.args
    if not _is_call(probabilities, native.quantize.default) or dtype not in FLOATS or not _has_heads(v):
        return
    assert isinstance(probabilities, fx.Node)
    softmax, *_, qmax = probabilities.args
    if not (_is_call(softmax, aten.softmax.int) or _is_call(softmax, aten._safe_softmax.default)):
        return
    assert isinstance(softmax, fx.Node)
    if softmax.args[1] not in (-1, 3) or not _private(softmax, probabilities):
        return
    scores, mask, negated = _unmasked(softmax.args[0])
    if not _is_call(scores, reference.matmul.default) or not _is_mask(mask):
        return
    assert isinstance(scores, fx.Node)
    q, q_scale, q_zero_point, turned, k_scale, k_zero_point, inner = scores.args
    if not _has_heads(q) or inner == torch.float64 or not _is_call(turned, aten.transpose.int):
        return
    assert isinstance(turned, fx.Node)
    axes: tuple[Any, ...] = turned.args[1:]
    if {axis % 4 for axis in axes} != {2, 3}:
        return
    with rewriter.before(node):
        if negated:
            mask = rewriter.call(aten.logical_not.default, (mask,), [node])
        elif mask is not None:
            mask = rewriter.call(aten.to.dtype, (mask, torch.float32), [node])
        grids = (q, q_scale, q_zero_point, turned.args[0], k_scale, k_zero_point, v, v_scale, v_zero_point)
        rest = (mask, p_scale, p_zero_point, qmax, None, None, 255, dtype)
        new = rewriter.call(native.int8_attention.default, (*grids, *rest), [node])
        result = rewriter.call(aten.transpose.int, (new, *_TO_VALUES), [node])
    _replace(node, result, rewriter)


def _replace(node: fx.Node, result: fx.Node, rewriter: Rewriter) -> None:
    for key in node.meta.keys() - result.meta.keys():
        result.meta[key] = node.meta[key]
    rewriter.replace(node, result)


def _unmasked(node: Any) -> tuple[Any, Any, bool]:
    """Scores, what masks them, and whether that is true for what is not seen."""
    if _is_call(node, aten.masked_fill.Scalar) and node.args[2] == -math.inf and only_reader(node) is not None:
        return node.args[0], node.args[1], True
    if _is_call(node, aten.add.Tensor) and not node.kwargs and only_reader(node) is not None:
        scores, mask = node.args
        if isinstance(mask, fx.Node) and mask.meta["val"].is_floating_point():
            return scores, mask, False
    return node, None, False


def _is_mask(mask: Any) -> bool:
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
