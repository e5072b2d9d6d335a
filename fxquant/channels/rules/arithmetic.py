"""Elementwise operations."""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from fxquant.channels.layouts import static
from fxquant.channels.rules.table import (
    cannot_broadcast,
    elementwise,
    rule,
    shape_of,
    tied,
)
from fxquant.channels.wants import Barrier, Choose, Outcome, Push, Want
from fxquant.ir import ops as _ops  # noqa: F401  (registers the ops that rules are for)
from fxquant.ir.arguments import args, source_of
from fxquant.ir.names import op_name

aten = torch.ops.aten


@rule(aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar)
def add(node: fx.Node, want: Want) -> Outcome:
    """(a, 0) to both sides; a constant k moves into the offset: (a, (a - 1) k + c) to the other side."""
    sign = -1.0 if node.target in (aten.sub.Tensor, aten.sub.Scalar) else 1.0
    sign *= float(args(node).alpha)
    left, right = args(node).self, args(node).other
    if isinstance(right, (int, float)):
        if not math.isfinite(right) or not math.isfinite(sign):
            return Barrier(f"{op_name(node.target)} adds a number that is not finite")
        want = Want(want.scale, want.offset + sign * right)
        pushed = elementwise(node, left, want)
        return Push(pushed) if pushed else cannot_broadcast(node)
    if not _is_tensor(left) or not _is_tensor(right):
        return Barrier(f"{op_name(node.target)} adds a number that the graph computes")
    if want.offset.any():
        # One side takes the whole shift, which comes from the constants that the request has passed so far.
        return _shift_to_one_side(node, want)
    sides = [elementwise(node, side, want) for side in (left, right)]
    if any(not side for side in sides):
        return _same_for_all_tokens(node, want) or cannot_broadcast(node)
    return Push([pair for side in sides if side for pair in side])


def _is_tensor(operand: object) -> bool:
    return isinstance(operand, fx.Node) and isinstance(operand.meta.get("val"), Tensor)


def _same_for_all_tokens(node: fx.Node, want: Want) -> Outcome | None:
    """The request with one factor along the axes on which an operand is broadcast; None if no channels are left."""
    axes = set()
    for name in ("self", "other"):
        shape = shape_of(args(node).node(name))
        sizes = [1] * (want.scale.ndim - len(shape)) + [static(size) or 0 for size in shape]
        lacking = {axis for axis, size in enumerate(sizes) if size == 1 and want.varies(axis)}
        if lacking and not any(want.varies(axis) for axis in range(want.scale.ndim) if axis not in lacking):
            return None
        axes |= lacking
    return tied(
        want, sorted(axes), f"{op_name(node.target)} adds the same to all tokens, which have to share their factors"
    )


def _shift_to_one_side(node: fx.Node, want: Want) -> Outcome:
    if node.target is not aten.add.Tensor or args(node).alpha != 1:
        return Barrier(f"{op_name(node.target)} cannot take a constant shift")
    plain = Want.of(want.scale)
    ways = []
    left, right = args(node).self, args(node).other
    for taker, other in ((left, right), (right, left)):
        first, second = elementwise(node, taker, want), elementwise(node, other, plain)
        if first and second:
            ways.append(Push([*first, *second]))
    return Choose(ways) if ways else cannot_broadcast(node)


@rule(aten.mul.Tensor, aten.mul.Scalar)
def mul(node: fx.Node, want: Want) -> Outcome:
    """(a, 0) to ONE side, the cheaper; an offset is not pushed through."""
    if want.offset.any():
        return Barrier("a constant shift cannot pass a product")
    sides = args(node).self, args(node).other
    ways = [Push(pushed) for side in sides if (pushed := elementwise(node, side, want))]
    if not ways:
        return cannot_broadcast(node)
    return Choose(ways) if len(ways) > 1 else ways[0]


@rule(aten.addcmul.default)
def addcmul(node: fx.Node, want: Want) -> Outcome:
    """(a, 0) to the summand and to ONE factor, the cheaper."""
    if want.offset.any():
        return Barrier("a constant shift cannot pass addcmul")
    operands = args(node).self, args(node).tensor1, args(node).tensor2
    summand, *factors = (elementwise(node, operand, want) for operand in operands)
    ways = [Push([*summand, *factor]) for factor in factors if summand and factor]
    return Choose(ways) if ways else cannot_broadcast(node)


@rule(aten.div.Tensor, aten.div.Scalar)
def div(node: fx.Node, want: Want) -> Outcome:
    """(a, 0) to the numerator."""
    if want.offset.any():
        return Barrier("a constant shift cannot pass a quotient")
    pushed = elementwise(node, args(node).self, want)
    return Push(pushed) if pushed else cannot_broadcast(node)


@rule(torch.ops.fxquant.channel_affine.default)
def channel_affine(node: fx.Node, want: Want) -> Outcome:
    """(a, 0) passes a factor per channel, and c passes one without shift."""
    if want.offset.any() or args(node).shift is not None:
        return Barrier("a constant shift cannot pass a factor")
    return Push([(source_of(node), want)])


@rule(aten.relu.default, aten.neg.default, aten.leaky_relu.default)
def positively_homogeneous(node: fx.Node, want: Want) -> Outcome:
    """relu, leaky_relu, neg, a > 0: (a, 0) passes."""
    if want.offset.any():
        return Barrier(f"a constant shift cannot pass {op_name(node.target)}")
    return Push([(source_of(node), want)])


@rule(
    aten.gelu.default,
    aten.silu.default,
    aten.sigmoid.default,
    aten.tanh.default,
    aten.exp.default,
    aten.pow.Tensor_Scalar,
    shifts=True,
)
def nonlinear(node: fx.Node, want: Want) -> Outcome:
    """Barrier: gelu, silu, sigmoid, tanh, exp, pow do not commute with a factor."""
    return Barrier(f"{op_name(node.target)} is nonlinear")
