"""Rules for rotations: a value yields ``x M``, where M is orthogonal and mixes channels within blocks only.

An op passes a rotation if it treats the channels of a block alike: ``f(x M) = f(x) M``. The offsets of such a want
hold the block of each channel (:func:`block_codes`), so that a rule can tell which channels are mixed with each other.
Layout ops move channels and blocks together. A rule of any other op first makes sure that it sees whole blocks.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from fxquant.channels.layouts import static
from fxquant.channels.rules import layout
from fxquant.channels.rules.ends import are_parameters, layer_of
from fxquant.channels.rules.row_sums import drops_out
from fxquant.channels.rules.table import ROTATIONS, Rule, cannot_broadcast, elementwise, shape_of, shift_rule, tied
from fxquant.channels.wants import IDENTITY, Barrier, End, Outcome, Push, Want
from fxquant.ir.arguments import args, source_of
from fxquant.ir.attention import factors_of
from fxquant.ir.layer_changes import OutputTurn
from fxquant.ir.names import op_name

if TYPE_CHECKING:
    from fxquant.ir.rewriter import Rewriter

aten = torch.ops.aten
_UNIT = 2.0**32  # A code is ``block size * _UNIT + number of the block``, exact in float64.

_MOVES: tuple[tuple[Rule, tuple[Any, ...]], ...] = (
    (
        layout.same,
        (
            *(aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default, aten.clone.default),
            *(aten.contiguous.default, aten.alias.default, aten.detach.default, aten.type_as.default),
        ),
    ),
    (
        layout.reshape,
        (
            *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints),
            *(aten.unflatten.int, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default, aten.squeeze.dims),
        ),
    ),
    (
        layout.permute,
        (aten.permute.default, aten.transpose.int, aten.t.default, aten.mT.default, aten.movedim.int),
    ),
    (layout.expand, (aten.expand.default,)),
    (layout.part, (aten.slice.Tensor, aten.select.int, aten.narrow.default)),
    (layout.stack, (aten.stack.default,)),
    (layout.along_tokens, (aten.roll.default, aten.flip.default)),
    (layout.index, (aten.index.Tensor,)),
    (layout.index_select, (aten.index_select.default,)),
    (layout.cat, (aten.cat.default, aten.concat.default)),
)
"""Layout ops, which have one rule for all requests."""


def block_codes(channels: int, block: int) -> npt.NDArray[np.float64]:
    """The code of the block of each channel, ``[channels]``: what offsets of a want hold."""
    return np.arange(channels, dtype=np.float64) // block + block * _UNIT


def _blocks(want: Want) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """The code of each position, and whether the position is rotated at all."""
    return want.offset, (want.scale > IDENTITY) & (want.offset >= _UNIT)


def whole(want: Want) -> bool:
    """Whether every block that occurs is there once, with all its channels."""
    codes, rotated = _blocks(want)
    found, counts = np.unique(codes[rotated], return_counts=True)
    return bool((counts == found // _UNIT).all()) and len(np.unique(want.scale[rotated])) == int(rotated.sum())


def apart(want: Want, axes: Iterable[int]) -> bool:
    """Whether no block extends over several positions along these axes."""
    codes, rotated = _blocks(want)
    numbers, inverse = np.unique(codes[rotated], return_inverse=True)
    for axis in axes:
        if not want.varies(axis):
            continue
        place = np.broadcast_to(
            np.arange(want.scale.shape[axis]).reshape([-1] + [1] * (want.scale.ndim - 1 - axis)), want.scale.shape
        )[rotated]
        low, high = np.full(len(numbers), place.size and place.max()), np.zeros(len(numbers), dtype=np.int64)
        np.minimum.at(low, inverse, place)
        np.maximum.at(high, inverse, place)
        if (low != high).any():
            return False
    return True


def rotation_rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register the rule of ops that compute: it is applied to wants with whole blocks only."""

    def decorate(function: Rule) -> Rule:
        def checked(node: fx.Node, want: Want) -> Outcome:
            found = function(node, want)
            if isinstance(found, (Push, End)) and not whole(want):
                return Barrier(f"part of a block of channels goes another way than {op_name(node.target)}")
            return found

        checked.__doc__, checked.__name__ = function.__doc__, function.__name__
        shift_rule(*targets, table=ROTATIONS)(checked)
        return function

    return decorate


for _rule, _targets in _MOVES:
    shift_rule(*_targets, table=ROTATIONS)(_rule)
shift_rule(operator.getitem, table=ROTATIONS)(layout.getitem)


@rotation_rule(aten.dropout.default)
def dropout(node: fx.Node, want: Want) -> Outcome:
    """In evaluation the same."""
    return Barrier("a rotation cannot pass dropout in training mode") if drops_out(node) else layout.same(node, want)


@rotation_rule(aten.add.Tensor, aten.sub.Tensor)
def add(node: fx.Node, want: Want) -> Outcome:
    """To both sides."""
    sides = [elementwise(node, side, want) for side in (args(node).self, args(node).other)]
    if any(not side for side in sides):
        return Barrier(f"an operand of {op_name(node.target)} is the same for several channels")
    return Push([pair for side in sides if side for pair in side])


@rotation_rule(aten.neg.default)
def neg(node: fx.Node, want: Want) -> Outcome:
    """The same."""
    return Push([(source_of(node), want)])


@rotation_rule(aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)
def mul(node: fx.Node, want: Want) -> Outcome:
    """To the side whose factor is the same for all channels of a block."""
    sides = [(args(node).self, args(node).other)]
    if node.target is aten.mul.Tensor:
        sides.append((args(node).other, args(node).self))
    for side, factor in sides:
        if isinstance(side, fx.Node) and apart(want, _axes_of(factor, want)):
            pushed = elementwise(node, side, want)
            if pushed:
                return Push(pushed)
    return Barrier(f"{op_name(node.target)} scales the channels of a block differently")


def _axes_of(factor: Any, want: Want) -> list[int]:
    """The axes of a want along which a factor may differ."""
    if not isinstance(factor, fx.Node) or not isinstance(factor.meta.get("val"), torch.Tensor):
        return []
    sizes = shape_of(factor)
    return [axis + want.scale.ndim - len(sizes) for axis, size in enumerate(sizes) if static(size) != 1]


@rotation_rule(aten.scaled_dot_product_attention.default)
def attention(node: fx.Node, want: Want) -> Outcome:
    """To v, where each block is within one head."""
    found = tied(want, [want.scale.ndim - 2], "attention mixes tokens, which have to share their rotation")
    if found is not None:
        return found
    value = args(node).node("value")
    if not apart(want, range(want.scale.ndim - 1)):
        return Barrier("a block of channels extends over several heads, whose attention differs")
    heads = [shape_of(n)[-3] if len(shape_of(n)) >= 3 else 1 for n in (node, value)]
    if str(heads[0]) != str(heads[1]):
        return Barrier("heads that share a value would need the same rotation")
    pushed = elementwise(node, value, want)
    return Push(pushed) if pushed else cannot_broadcast(node)


@rotation_rule(aten.matmul.default, aten.bmm.default)
def matmul(node: fx.Node, want: Want) -> Outcome:
    """To the right operand's columns, or to the left one's rows, where each block is within one product."""
    left, right = factors_of(node)
    last = want.scale.ndim - 1
    if min(len(shape_of(left)), len(shape_of(right))) < 2:
        return Barrier("a product with a vector has no channels to rotate")
    rows = want.varies(last - 1) and not want.varies(last)
    if not rows:
        found = tied(want, [last - 1], "a matrix product mixes tokens, which have to share their rotation")
        if found is not None:
            return found
    if not apart(want, (axis for axis in range(last + 1) if axis != last - rows)):
        return Barrier("a block of channels extends over several matrix products")
    pushed = elementwise(node, left if rows else right, want)
    return Push(pushed) if pushed else cannot_broadcast(node)


@rotation_rule(aten.rms_norm.default)
def rms_norm(node: fx.Node, want: Want) -> Outcome:
    """The same, without a weight: a rotation keeps the root mean square."""
    if args(node).weight is not None:
        return Barrier(f"{node.name} scales the channels of a block differently")
    if not apart(want, range(want.scale.ndim - len(args(node).normalized_shape))):
        return Barrier(f"a block of channels extends over several norms of {node.name}")
    return Push([(source_of(node), want)])


@rotation_rule(aten.linear.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
def linear(node: fx.Node, want: Want) -> Outcome:
    """End: rows of W and of b are rotated."""
    weight = shape_of(args(node).node("weight"))
    axis = want.scale.ndim - 1 if node.target is aten.linear.default else want.scale.ndim - len(weight) + 1
    others = (other for other in range(want.scale.ndim) if other != axis)
    found = tied(want, others, "the outputs of a layer cannot be rotated differently from token to token")
    if found is not None:
        return found
    if len(weight) < 2 or not are_parameters(node, "weight", "bias"):
        return Barrier(f"the weight or the bias of {node.name} is computed in the graph")
    return End(partial(_fold_rows, node), into=layer_of(node))


def _fold_rows(node: fx.Node, rewriter: Rewriter, turn: OutputTurn) -> None:
    for name in ("weight", "bias"):
        if getattr(args(node), name) is not None:
            rewriter.fold(node, name, lambda rows: turn.apply(rows, 0), by=turn.by)


@rotation_rule("get_attr")
def parameter(node: fx.Node, want: Want) -> Outcome:
    """End: (a private copy of) the parameter is rotated."""
    axes = [axis for axis in range(want.scale.ndim) if want.varies(axis)]
    if not node.meta["val"].is_floating_point() or len(axes) != 1:
        return Barrier(f"{node.target} has its channels along several axes")
    if shape_of(node)[axes[0]] != want.scale.shape[axes[0]]:
        return Barrier(f"{node.target} holds one element for all channels")
    return End(partial(_fold_parameter, node, axes[0]), into=str(node.target))


def _fold_parameter(
    node: fx.Node, axis: int, rewriter: Rewriter, turn: OutputTurn, readers: Sequence[fx.Node] | None = None
) -> fx.Node:
    return rewriter.fold_attribute(node, lambda values: turn.apply(values, axis), readers, by=turn.by)


@rotation_rule(
    *(aten.gelu.default, aten.silu.default, aten.sigmoid.default, aten.tanh.default, aten.relu.default),
    *(aten.leaky_relu.default, aten.exp.default, aten.pow.Tensor_Scalar),
)
def nonlinear(node: fx.Node, want: Want) -> Outcome:
    """Barrier: gelu, silu, relu, sigmoid, tanh, exp, pow do not commute with a rotation."""
    return Barrier(f"{op_name(node.target)} is nonlinear")


@rotation_rule(aten.layer_norm.default)
def layer_norm(node: fx.Node, want: Want) -> Outcome:
    """Barrier: a rotation changes the mean over channels."""
    return Barrier(f"{node.name} subtracts the mean over channels, which a rotation changes")


@rotation_rule("placeholder")
def model_input(node: fx.Node, want: Want) -> Outcome:
    """Barrier: an input of the model."""
    return Barrier(f"it comes straight from the model's input {node.name}")
