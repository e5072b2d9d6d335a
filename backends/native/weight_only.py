"""Layers with float activations whose weights are codes: linears, and looked-up rows of tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from fxquant.backends.derived_tensors import has_own_scales
from fxquant.backends.native.library import FLOATS
from fxquant.ir.arguments import Arguments, args
from fxquant.ir.rewriter import Rewriter
from fxquant.numerics.formats import bits_of, is_integer

aten, reference = torch.ops.aten, torch.ops.fxquant


FLOAT_FORMATS = frozenset({"nf4", "mxfp4", "nvfp4", "fp8", "fp8e5m2", "mxfp8", "mxfp6", "mxfp6e3m2"})
"""Formats, beside the integers, whose weights the kernels decode. Formats of other packages have the reference op."""


class Kernel(NamedTuple):
    """A kernel that multiplies float activations with a packed weight.

    Attributes:
        op: ``op(x, *held, bias, kind, group_size, out_features)``, where ``kind`` is the number of bits of an integer
            weight, or the name of the format of any other.
        fits: Whether the kernel takes weights of a format, by name, with this many inputs per group; 0 means one group.
        hold: Makes the weight and its scales as the kernel reads them, from the ``dequantize_weight``.
    """

    op: Any
    fits: Callable[[str, int], bool]
    hold: Callable[[Arguments], tuple[fx.Node | None, ...]]


def lower_linear(node: fx.Node, rewriter: Rewriter, kernels: Sequence[Kernel]) -> None:
    """Replace a float linear with a dequantized weight by one kernel, if one of them takes the weight.

    Args:
        node: An ``aten.linear``.
        rewriter: The rewriter of the graph.
        kernels: The kernels, of which the first that fits is taken. If none fits, the reference op decodes the weight.
    """
    x, weight, bias = args(node).node("input"), args(node).node("weight"), args(node).bias
    if weight.target is not reference.dequantize_weight.default or len(weight.users) != 1:
        return
    given = args(weight)
    packed, format, group_size = given.node("wq"), given.format, given.group_size
    if given.dtype not in FLOATS or packed.op != "get_attr" or not has_own_scales(packed, given.scale):
        return
    kernel = next((kernel for kernel in kernels if kernel.fits(format, group_size)), None)
    if kernel is None:
        return
    kind = bits_of(format) if is_integer(format) else format
    out = int(packed.meta["val"].shape[0])
    with rewriter.before(node):
        arguments = (x, *kernel.hold(given), bias, kind, group_size, out)
        new = rewriter.call(kernel.op, arguments, [weight, node], layer=True)
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
