"""Rules for shifts, ``x + c``, of ops whose rules for shifts differ from those for factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import fx

from fxquant.channels.rules import matrices
from fxquant.channels.rules.ends import are_parameters, layer_of
from fxquant.channels.rules.layout import same
from fxquant.channels.rules.row_sums import attention_drops, drops_out, product_drops
from fxquant.channels.rules.table import (
    STATIC_SHIFTS,
    cannot_broadcast,
    elementwise,
    shape_of,
    shift_rule,
    tied,
)
from fxquant.channels.wants import Barrier, Choose, End, Outcome, Push, Tie, Want
from fxquant.ir.arguments import args
from fxquant.ir.attention import factors_of
from fxquant.ir.borders import hand_over
from fxquant.ir.histories import digest, made_from
from fxquant.ir.layers import parameter_of
from fxquant.ir.names import op_name
from fxquant.ir.time_tables import TimeTable, add_rows, plus_rows, read_table, replace_rows

if TYPE_CHECKING:
    from fxquant.ir.rewriter import Rewriter

aten = torch.ops.aten


@shift_rule(aten.linear.default)
def linear(node: fx.Node, want: Want) -> Outcome:
    """End: the bias becomes a table with a row for each bin of timesteps."""
    if len(shape_of(args(node).node("weight"))) < 2:
        return Barrier(f"the weight of {node.name} is a vector, so its outputs are not channels")
    found = tied(
        want, range(want.scale.ndim - 1), "a linear's outputs cannot be shifted differently from token to token"
    )
    if found is not None:
        return found
    if not are_parameters(node, "bias"):
        return Barrier(f"the bias of {node.name} is computed in the graph")
    return End(partial(_fold_bias, node), into=layer_of(node), gives="bias" if args(node).bias is None else None)


def _fold_bias(node: fx.Node, rewriter: Rewriter, table: TimeTable) -> None:
    shift_output(node, rewriter, table.map(lambda rows: rows.flatten(1).expand(-1, shape_of(node)[-1])))


def shift_output(node: fx.Node, rewriter: Rewriter, table: TimeTable) -> None:
    """Make a linear yield ``y + row``: its bias moves into the rows ``[bins, out]``."""
    bias = args(node).bias
    total = plus_rows(node)
    if total is not None:  # It has rows already: one table holds both.
        held = read_table(args(total).node("other"), table.timestep, rewriter)
        assert held is not None
        replace_rows(rewriter, total, held.map(lambda rows: rows.double()).plus(table))
    elif not are_parameters(node, "bias"):  # A bias that is computed in the graph stays, and the rows are added.
        hand_over(node, add_rows(rewriter, node, table, [node], list(node.users)))
    elif table.static and bias is not None:
        rewriter.fold(node, "bias", lambda b: b.double() + table.rows[0].to(b.device), by=("shift", table.origin))
        rewriter.log.note_shift(table.rows[0])
    elif table.static:
        given = None if table.follows is None else made_from("bias", table.origin)
        rewriter.give(node, "bias", table.rows[0], given)
    else:
        if bias is not None:
            parameter = parameter_of(bias)
            own = rewriter.tensor(parameter).double()
            follows = digest(table.origin, rewriter.history(parameter).digest)
            table = replace(table.map(lambda rows: rows.to(own.device) + own), follows=follows)
            rewriter.leave_out(node, "bias")
        hand_over(node, add_rows(rewriter, node, table, [node], list(node.users)))


@shift_rule(aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar)
def add(node: fx.Node, want: Want) -> Outcome:
    """To ONE side, the cheaper."""
    sides = [args(node).self]
    if node.target is aten.add.Tensor and args(node).alpha == 1:
        sides.append(args(node).other)
    ways = [Push(pushed) for side in sides if (pushed := elementwise(node, side, want))]
    if not ways:
        return cannot_broadcast(node)
    return Choose(ways) if len(ways) > 1 else ways[0]


@shift_rule(
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.div.Tensor,
    aten.div.Scalar,
    aten.relu.default,
    aten.leaky_relu.default,
    aten.neg.default,
    torch.ops.fxquant.channel_affine.default,
)
def product(node: fx.Node, want: Want) -> Outcome:
    """Barrier: a shift cannot pass a product, a quotient, relu or neg."""
    return Barrier(f"a shift cannot pass {op_name(node.target)}")


@shift_rule(aten.dropout.default)
def dropout(node: fx.Node, want: Want) -> Outcome:
    """In evaluation the same."""
    return Barrier("a constant shift cannot pass dropout in training mode") if drops_out(node) else same(node, want)


@shift_rule(aten.scaled_dot_product_attention.default)
def attention(node: fx.Node, want: Want) -> Outcome:
    """To v, where rows of the softmax sum to 1: no row may be masked as a whole, and nothing dropped out."""
    reason = attention_drops(node)
    return matrices.attention(node, want) if reason is None else Barrier(reason)


@shift_rule(aten.matmul.default, aten.bmm.default)
def matmul(node: fx.Node, want: Want) -> Outcome:
    """To the right operand's columns, if the left one is a softmax, whose rows sum to 1."""
    left, right = factors_of(node)
    if (reason := product_drops(left)) is not None:
        return Barrier(reason)
    if len(shape_of(left)) < 2 or len(shape_of(right)) < 2:
        return Barrier("a product with a vector has no channels to shift")
    found = tied(want, [want.scale.ndim - 2], "a matrix product mixes tokens, which have to share their shifts")
    if found is not None:
        return found
    pushed = elementwise(node, right, want)
    return Push(pushed) if pushed else cannot_broadcast(node)


@shift_rule(aten.einsum.default)
def einsum(node: fx.Node, want: Want) -> Outcome:
    """To the second factor, if the first is a softmax over what is summed."""
    letters = matrices.letters_of(node)
    operands = args(node).tensors
    reason = "a shift cannot pass an einsum" if letters is None else matrices.einsum_drops(operands, letters)
    if reason is not None:
        return Barrier(reason)
    shifted = Want.of(want.scale, np.ones(want.scale.shape))  # As an offset: to the second factor only.
    found = matrices.einsum(node, shifted)
    if isinstance(found, Tie):
        return Tie(Want.of(found.want.scale), found.ties, found.reason)
    if isinstance(found, Push):
        return Push([(source, Want.of(moved.scale)) for source, moved in found.inputs])
    return found


@shift_rule(aten.layer_norm.default, aten.rms_norm.default, aten.embedding.default, "get_attr", "placeholder")
def moving(node: fx.Node, want: Want) -> Outcome:
    """Barrier: parameters that do not depend on the timestep cannot take a shift that does."""
    return Barrier(f"{node.name} has no bias that could depend on the timestep")


@shift_rule(aten.layer_norm.default, table=STATIC_SHIFTS)
def layer_norm(node: fx.Node, want: Want) -> Outcome:
    """End: bias <- bias + c; a norm without bias is given one."""
    shape = args(node).normalized_shape
    if not all(isinstance(size, int) for size in shape):
        return Barrier(f"{node.name} normalizes over the batch")
    axes = range(want.scale.ndim - len(shape))
    found = tied(want, axes, "a norm's outputs cannot be shifted differently from token to token")
    if found is not None:
        return found
    if not are_parameters(node, "weight", "bias"):
        return Barrier(f"the bias of {node.name} is computed in the graph")
    given = args(node).bias is not None
    gives = None if given else "bias"
    return End(partial(_fold_norm, node), into=node.name, operands=0 if given else 1, gives=gives)


def _fold_norm(node: fx.Node, rewriter: Rewriter, table: TimeTable) -> None:
    shape = list(args(node).normalized_shape)
    c = table.rows[0].reshape(table.rows.shape[-len(shape) :]).expand(shape)
    if args(node).bias is not None:
        rewriter.fold(node, "bias", lambda b: b.double() + c.to(b.device), by=("shift", c))
    else:
        rewriter.give(node, "bias", c)


@shift_rule("get_attr", table=STATIC_SHIFTS)
def parameter(node: fx.Node, want: Want) -> Outcome:
    """End: add to (a private copy of) the parameter."""
    if not node.meta["val"].is_floating_point():
        return Barrier(f"{node.target} is not a floating-point tensor")
    return End(partial(_fold_parameter, node), into=str(node.target))


def _fold_parameter(
    node: fx.Node, rewriter: Rewriter, table: TimeTable, readers: Sequence[fx.Node] | None = None
) -> fx.Node:
    shift = table.rows[0]
    return rewriter.fold_attribute(node, lambda p: p.double() + shift.to(p.device), readers, by=("shift", shift))
