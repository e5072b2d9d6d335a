"""Layers with float activations whose weights are codes: linears, and looked-up rows of tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxquant.backends.derived_tensors import has_own_scales
from fxquant.backends.native.library import FLOATS
from fxquant.ir.arguments import args
from fxquant.ir.rewriter import Rewriter
from fxquant.numerics.formats import bits_of, is_integer

aten, reference = torch.ops.aten, torch.ops.fxquant


def lower_linear(
    node: fx.Node,
    rewriter: Rewriter,
    op: Any,
    fits: Callable[[int], bool],
    hold: Callable[[fx.Node, fx.Node, int, int, int], fx.Node],
) -> None:
    """Replace a float linear with a dequantized weight by one kernel, if the kernel takes the weight.

    Args:
        node: An ``aten.linear``.
        rewriter: The rewriter of the graph.
        op: The kernel: ``op(x, weight, scale, zero_point, bias, bits, group_size, out_features)``.
        fits: Whether the kernel takes weights with this many inputs per group; 0 means one group.
        hold: Makes the weight that the kernel reads, from packed codes, zero points, bits, inputs and inputs per group.
    """
    x, weight, bias = args(node).node("input"), args(node).node("weight"), args(node).bias
    if weight.target is not reference.dequantize_weight.default or len(weight.users) != 1:
        return
    dequantized = args(weight)
    packed, zero_point, group_size = dequantized.node("wq"), dequantized.zero_point, dequantized.group_size
    if dequantized.dtype not in FLOATS or packed.op != "get_attr" or not fits(group_size):
        return
    if not is_integer(dequantized.format) or not has_own_scales(packed, dequantized.scale):
        return  # The reference op decodes it.
    bits = bits_of(dequantized.format)
    out = int(packed.meta["val"].shape[0])
    with rewriter.before(node):
        codes = hold(packed, zero_point, bits, dequantized.in_features, group_size)
        arguments = (x, codes, dequantized.scale, zero_point, bias, bits, group_size, out)
        new = rewriter.call(op, arguments, [weight, node], layer=True)
    rewriter.replace(node, new)
    rewriter.erase(weight)
    if not packed.users:
        rewriter.forget(packed)


def lower_lookup(node: fx.Node, rewriter: Rewriter) -> None:
    """Dequantize looked-up rows of a table of 8-bit codes with ops that can be fused."""
    given = args(node)
    codes, dtype = given.node("wq"), given.dtype
    if codes.op == "get_attr" or given.format != "int8" or given.group_size or dtype not in FLOATS:
        return

    def call(op: torch._ops.OpOverload, *arguments: Any) -> fx.Node:
        return rewriter.call(op, arguments, [node], layer=True)

    with rewriter.before(node):
        real, zero = (call(aten.to.dtype, value, torch.float32) for value in (codes, given.zero_point))
        new = call(aten.mul.Tensor, call(aten.sub.Tensor, real, zero), given.scale)
        if dtype != torch.float32:
            new = call(aten.to.dtype, new, dtype)
    rewriter.replace(node, new)
