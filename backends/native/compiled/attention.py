"""Attention as one kernel: float values are multiplied in bfloat16, codes as integers."""

from __future__ import annotations

import math

import torch
from torch import fx

from fxquant.backends.native.attention import TO_VALUES, is_mask, lower_codes, replace
from fxquant.backends.native.library import FLOATS
from fxquant.ir.arguments import args
from fxquant.ir.rewriter import Rewriter

aten, reference, native = torch.ops.aten, torch.ops.fxquant, torch.ops.fxquant_native


def lower(graph: fx.Graph, rewriter: Rewriter, floats: bool) -> None:
    """Rewrite attentions of four axes: attentions of codes, and with ``floats`` also attentions of float values."""
    for node in list(graph.nodes):
        if node.target is reference.matmul.default:
            lower_codes(node, rewriter, native.int8_attention.default)
        elif floats and node.target is aten.scaled_dot_product_attention.default:
            _lower_floats(node, rewriter)


def _lower_floats(node: fx.Node, rewriter: Rewriter) -> None:
    given = args(node)
    q, k, v, mask = given.node("query"), given.node("key"), given.node("value"), given.attn_mask
    values = [part.meta["val"] for part in (q, k, v)]
    if any(value.dim() != 4 or value.dtype != values[0].dtype for value in values) or values[0].dtype not in FLOATS:
        return
    if given.dropout_p or not is_mask(mask):
        return
    scale = 1 / math.sqrt(int(values[0].shape[-1])) if given.scale is None else given.scale
    if not isinstance(scale, float):
        return
    with rewriter.before(node):
        if mask is not None and mask.meta["val"].dtype != torch.bool:
            mask = rewriter.call(aten.to.dtype, (mask, torch.float32), [node], layer=True)
        arguments = (q, k, v, mask, bool(given.is_causal), scale, None, None, 255)
        new = rewriter.call(native.bf16_attention.default, arguments, [node], layer=True)
        result = rewriter.call(aten.transpose.int, (new, *TO_VALUES), [node], layer=True)
    replace(node, result, rewriter)
