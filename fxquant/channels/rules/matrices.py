"""Attention and matrix products, which mix tokens."""

from __future__ import annotations

import numpy as np
import torch
from torch import fx

from fxquant.channels.layouts import static
from fxquant.channels.rules.row_sums import attention_drops, product_drops
from fxquant.channels.rules.table import cannot_broadcast, elementwise, node_of, rule, shape_of, tied
from fxquant.channels.wants import Barrier, Outcome, Push, Want
from fxquant.ir import ops as _ops  # noqa: F401  (registers the ops that rules are for)

aten = torch.ops.aten


@rule(aten.scaled_dot_product_attention.default)
def attention(node: fx.Node, want: Want) -> Outcome:
    """To v, per head channel; c passes where rows of the softmax sum to 1. Grouped-query heads share theirs."""
    if want.offset.any() and (reason := attention_drops(node)) is not None:
        return Barrier(reason)
    found = tied(want, [want.scale.ndim - 2], "attention mixes tokens, which have to share their factors")
    if found is not None:
        return found
    value = node_of(node.args[2])
    heads, kv_heads = (shape_of(n)[-3] if len(shape_of(n)) >= 3 else 1 for n in (node, value))
    if str(heads) == str(kv_heads) or want.scale.ndim < 3 or not want.varies(want.scale.ndim - 3):
        pushed = elementwise(node, value, want)  # Batches are broadcast.
        return Push(pushed) if pushed else cannot_broadcast(node)
    heads, kv_heads = static(heads), static(kv_heads)
    if not heads or not kv_heads or heads % kv_heads or len(shape_of(value)) != want.scale.ndim:
        return Barrier("the heads of query and value do not match")
    axis = want.scale.ndim - 3
    grouped = [*want.scale.shape[:axis], kv_heads, heads // kv_heads, *want.scale.shape[axis + 1 :]]
    shared = want.map(lambda array: np.take(array.reshape(grouped), 0, axis=axis + 1))
    if (np.expand_dims(shared.offset, axis + 1) != want.offset.reshape(grouped)).any():
        return Barrier("heads that share a value ask for different constant shifts")
    every = np.broadcast_to(np.expand_dims(shared.scale, axis + 1), grouped)
    return Push([(value, shared)], ties=[(every, want.scale.reshape(grouped))])


@rule(aten.matmul.default, aten.bmm.default)
def matmul(node: fx.Node, want: Want) -> Outcome:
    """(a, 0) to the right operand's columns, with c behind a softmax, or to the left one's rows."""
    left, right = node_of(node.args[0]), node_of(node.args[1])
    if want.offset.any() and (reason := product_drops(left)) is not None:
        return Barrier(reason)
    rows = min(len(shape_of(left)), len(shape_of(right))) >= 2 and want.varies(want.scale.ndim - 2)
    if (
        rows and not want.varies(want.scale.ndim - 1) and not want.offset.any()
    ):  # Channels first, as linear attention has them.
        pushed = elementwise(node, left, want)
        return Push(pushed) if pushed else cannot_broadcast(node)
    if len(shape_of(right)) < 2 or want.scale.ndim < len(shape_of(right)):
        return Barrier("a product with a vector has no channels to scale")
    found = tied(want, [want.scale.ndim - 2], "a matrix product mixes tokens, which have to share their factors")
    if found is not None:
        return found
    pushed = elementwise(node, right, want)
    return Push(pushed) if pushed else cannot_broadcast(node)
