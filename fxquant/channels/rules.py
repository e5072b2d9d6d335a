"""One small rule an op: what a request on its result asks of its inputs, or how it is met right there.

A rule is a function of the node and the :class:`~fxquant.channels.wants.Want` on its value; it looks at shapes and
arguments only, never at values. ``fxquant list rules`` prints the first line of each docstring. See
``docs/channel-rules.md`` for how to add one.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from fxquant.capture import LAYER
from fxquant.channels.layouts import broadcast_back, compress, embed, reshape_back, static, stretch
from fxquant.channels.wants import Barrier, Choose, End, Outcome, Push, Tie, Want
from fxquant.errors import DuplicateNameError
from fxquant.ir import ops as _ops  # noqa: F401  (registers the ops that rules are for)

if TYPE_CHECKING:
    from fxquant.ir.rewriter import Rewriter

aten = torch.ops.aten
Rule = Callable[[fx.Node, Want], Outcome]

RULES: dict[Any, Rule] = {}
"""The rule of each op, keyed by ``node.target``; ``"get_attr"`` and ``"placeholder"`` stand for those node kinds."""


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register the rule of one or several ops.

    Raises:
        DuplicateNameError: If one of them has a rule already.
    """

    def decorate(function: Rule) -> Rule:
        for target in targets:
            if target in RULES:
                raise DuplicateNameError(f"op {target} already has the channel rule {RULES[target].__name__!r}")
            RULES[target] = function
        return function

    return decorate


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """Shape of a node's value; symbolic sizes stay symbolic."""
    return tuple(node.meta["val"].shape)


def outcome(node: fx.Node, want: Want) -> Outcome:
    """Apply the rule of a node's op; an op without one is a barrier."""
    key = node.target if node.op == "call_function" else node.op
    found = RULES.get(key)
    if found is None:
        return Barrier(f"{_op_name(node)} has no channel rule")
    result = found(node, want)
    if isinstance(result, Choose):
        ways = [way for way in result.ways if _meets_every_use(node, way)]
        return Choose(ways) if ways else _read_twice(node)
    if isinstance(result, Push) and not _meets_every_use(node, result):
        return _read_twice(node)
    return result


def _meets_every_use(node: fx.Node, way: Push) -> bool:
    """Whether no input that is to be scaled is read by the node a further time, as both sides of a square are."""
    uses = Counter(_arguments(node))
    return all(uses[source] in (0, asked) for source, asked in Counter(source for source, _ in way.inputs).items())


def _arguments(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    map_arg((node.args, dict(node.kwargs)), found.append)
    return found


def _read_twice(node: fx.Node) -> Barrier:
    names = ", ".join(source.name for source, uses in Counter(_arguments(node)).items() if uses > 1)
    return Barrier(f"{_op_name(node)} reads {names} more than once")


def _tied(want: Want, axes: Iterable[int], reason: str) -> Tie | Barrier | None:
    """The request with one factor along these axes; None if it has that already."""
    axes = [axis for axis in axes if want.varies(axis)]
    if not axes:
        return None
    one = want
    for axis in axes:
        one = one.map(lambda array, axis=axis: np.take(array, [0], axis=axis))  # type: ignore[misc]
    if (want.offset != one.offset).any():
        return Barrier(reason)
    return Tie(one, [(want.scale, np.broadcast_to(one.scale, want.scale.shape))], reason)


def _op_name(node: fx.Node) -> str:
    target = node.target
    return str(getattr(target, "_name", None) or getattr(target, "__name__", target)).removeprefix("aten::")


def _elementwise(node: fx.Node, operand: Any, want: Want) -> list[tuple[fx.Node, Want]] | None:
    """The request on one operand of an elementwise op; nothing for a number, None if it cannot be stated."""
    if not isinstance(operand, fx.Node) or not isinstance(operand.meta.get("val"), Tensor):
        return []
    moved = broadcast_back(want, shape_of(operand))
    if moved is None and operand.op == "get_attr":  # A parameter can be given the elements that it lacks.
        extra = want.scale.ndim - len(shape_of(operand))
        if not any(want.varies(axis) for axis in range(extra)):
            moved = want.map(lambda array: array.reshape(array.shape[extra:]))
    return None if moved is None else [(operand, moved)]


def _axis(node: fx.Node, axis: int) -> int:
    return axis % len(shape_of(node))


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


# --- where a request ends -------------------------------------------------------------------------------------------


@rule(aten.linear.default)
def linear(node: fx.Node, want: Want) -> Outcome:
    """End: W <- diag(a) W, b <- a b + c."""
    reason = "a linear's outputs cannot be scaled differently from token to token"
    return _tied(want, range(want.scale.ndim - 1), reason) or _rows_end(node, want)


@rule(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
def convolution(node: fx.Node, want: Want) -> Outcome:
    """End: the same, for output channels."""
    channels = want.scale.ndim - len(shape_of(_node(node.args[1]))) + 1  # An unbatched input has its channels first.
    reason = "a convolution's outputs cannot be scaled differently from place to place"
    return _tied(want, (axis for axis in range(want.scale.ndim) if axis != channels), reason) or _rows_end(node, want)


def _rows_end(node: fx.Node, want: Want) -> Outcome:
    if not _are_parameters(node, 1, 2):
        return Barrier(f"the weight of {node.name} is computed in the graph")
    return End(partial(_fold_rows, node, bool(want.offset.any())), into=_layer(node))


def _fold_rows(node: fx.Node, shifted: bool, rewriter: Rewriter, a: Tensor, c: Tensor) -> None:
    out_features = shape_of(_node(node.args[1]))[0]
    rows, shift = a.flatten().expand(out_features), c.flatten().expand(out_features)
    rewriter.fold(node, 1, lambda w: w.double() * rows.reshape(-1, *[1] * (w.dim() - 1)))
    if _argument(node, 2, "bias") is not None:
        rewriter.fold(node, 2, lambda b: b.double() * rows + shift)
    elif shifted:
        rewriter.give(node, 2, "bias", shift)


def _are_parameters(node: fx.Node, *positions: int) -> bool:
    given = (node.args[position] if len(node.args) > position else None for position in positions)
    return all(argument is None or _node(argument).op == "get_attr" for argument in given)


def _node(argument: Any) -> fx.Node:
    assert isinstance(argument, fx.Node)
    return argument


def _layer(node: fx.Node) -> str:
    return str(node.meta.get(LAYER, node.name))


@rule(aten.layer_norm.default)
def layer_norm(node: fx.Node, want: Want) -> Outcome:
    """End: weight <- a weight, bias <- a bias + c; a norm without weights is given them."""
    return _norm(node, want, weight=2, bias=3)


@rule(aten.rms_norm.default)
def rms_norm(node: fx.Node, want: Want) -> Outcome:
    """End: weight <- a weight; a norm without a weight is given one."""
    return _norm(node, want, weight=2, bias=None)


def _norm(node: fx.Node, want: Want, weight: int, bias: int | None) -> Outcome:
    normalized = len(node.args[1])  # type: ignore[arg-type]
    tied = _tied(
        want, range(want.scale.ndim - normalized), "a norm's outputs cannot be scaled differently from token to token"
    )
    if tied is not None:
        return tied
    if not _are_parameters(node, weight, *([] if bias is None else [bias])):
        return Barrier(f"the weight of {node.name} is computed in the graph")
    if bias is None and want.offset.any():
        return Barrier("an RMS norm cannot take a constant shift")
    given = _argument(node, weight, "weight") is not None
    fold = partial(_fold_norm, node, weight, bias, bool(want.offset.any()))
    return End(fold, into=node.name, operands=0 if given else 1)


def _fold_norm(
    node: fx.Node, weight: int, bias: int | None, shifted: bool, rewriter: Rewriter, a: Tensor, c: Tensor
) -> None:
    shape = list(node.args[1])  # type: ignore[arg-type]
    a, c = (t.reshape(t.shape[t.dim() - len(shape) :]).expand(shape) for t in (a, c))
    if _argument(node, weight, "weight") is None:
        rewriter.give(node, weight, "weight", a)
    else:
        rewriter.fold(node, weight, lambda w: w.double() * a)
    if bias is not None and _argument(node, bias, "bias") is not None:
        rewriter.fold(node, bias, lambda b: b.double() * a + c)
    elif bias is not None and shifted:
        rewriter.give(node, bias, "bias", c)


@rule(aten.embedding.default)
def embedding(node: fx.Node, want: Want) -> Outcome:
    """End: fold into the columns of (a private copy of) the table."""
    tied = _tied(
        want, range(want.scale.ndim - 1), "an embedding's rows cannot be scaled differently from token to token"
    )
    if tied is not None:
        return tied
    if not _are_parameters(node, 0):
        return Barrier(f"the table of {node.name} is computed in the graph")
    return End(partial(_fold_table, node), into=_layer(node))


def _fold_table(node: fx.Node, rewriter: Rewriter, a: Tensor, c: Tensor) -> None:
    rewriter.fold(node, 0, lambda table: table.double() * a.flatten() + c.flatten())


@rule("get_attr")
def parameter(node: fx.Node, want: Want) -> Outcome:
    """End: fold into (a private copy of) the parameter."""
    if not node.meta["val"].is_floating_point():
        return Barrier(f"{node.target} is not a floating-point tensor")
    return End(
        lambda rewriter, a, c: rewriter.fold_attribute(node, lambda p: p.double() * a + c), into=str(node.target)
    )


@rule("placeholder")
def model_input(node: fx.Node, want: Want) -> Outcome:
    """Barrier: an input of the model."""
    return Barrier(f"it comes straight from the model's input {node.name}")


# --- arithmetic -----------------------------------------------------------------------------------------------------


@rule(aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar)
def add(node: fx.Node, want: Want) -> Outcome:
    """(a, 0) to both sides; a constant k moves into the offset: (a, (a - 1) k + c) to the other side."""
    sign = -1.0 if node.target in (aten.sub.Tensor, aten.sub.Scalar) else 1.0
    sign *= float(node.kwargs.get("alpha", 1))  # type: ignore[arg-type]
    left, right = node.args[0], node.args[1]
    if isinstance(right, (int, float)):
        want = Want(want.scale, want.offset + sign * right)
        pushed = _elementwise(node, left, want)
        return Push(pushed) if pushed else _cannot_broadcast(node)
    if want.offset.any():
        # One side takes the whole shift; without it a constant could not have been passed on the way here.
        return _shift_to_one_side(node, want)
    sides = [_elementwise(node, side, want) for side in (left, right)]
    if any(not side for side in sides):
        return _cannot_broadcast(node)
    return Push([pair for side in sides if side for pair in side])


def _shift_to_one_side(node: fx.Node, want: Want) -> Outcome:
    if node.target is not aten.add.Tensor or node.kwargs:
        return Barrier(f"{_op_name(node)} cannot take a constant shift")
    plain = Want.of(want.scale)
    ways = []
    for taker, other in ((0, 1), (1, 0)):
        first, second = _elementwise(node, node.args[taker], want), _elementwise(node, node.args[other], plain)
        if first and second:
            ways.append(Push([*first, *second]))
    return Choose(ways) if ways else _cannot_broadcast(node)


def _cannot_broadcast(node: fx.Node) -> Barrier:
    return Barrier(f"an operand of {_op_name(node)} is broadcast along the channels")


@rule(aten.mul.Tensor, aten.mul.Scalar)
def mul(node: fx.Node, want: Want) -> Outcome:
    """(a, 0) to ONE side, the cheaper; an offset is not pushed through."""
    if want.offset.any():
        return Barrier("a constant shift cannot pass a product")
    ways = [Push(pushed) for side in node.args[:2] if (pushed := _elementwise(node, side, want))]
    if not ways:
        return _cannot_broadcast(node)
    return Choose(ways) if len(ways) > 1 else ways[0]


@rule(aten.div.Tensor, aten.div.Scalar)
def div(node: fx.Node, want: Want) -> Outcome:
    """(a, 0) to the numerator."""
    if want.offset.any():
        return Barrier("a constant shift cannot pass a quotient")
    pushed = _elementwise(node, node.args[0], want)
    return Push(pushed) if pushed else _cannot_broadcast(node)


@rule(torch.ops.fxquant.channel_affine.default)
def channel_affine(node: fx.Node, want: Want) -> Outcome:
    """(a, 0) passes a factor per channel, and c passes one without shift."""
    if want.offset.any() or _argument(node, 2, "shift") is not None:
        return Barrier("a constant shift cannot pass a factor")
    return Push([(_source(node), want)])


@rule(aten.relu.default, aten.neg.default, aten.leaky_relu.default)
def positively_homogeneous(node: fx.Node, want: Want) -> Outcome:
    """relu, leaky_relu, neg, a > 0: (a, 0) passes."""
    if want.offset.any():
        return Barrier(f"a constant shift cannot pass {_op_name(node)}")
    return Push([(_source(node), want)])


@rule(
    aten.gelu.default,
    aten.silu.default,
    aten.sigmoid.default,
    aten.tanh.default,
    aten.exp.default,
    aten.pow.Tensor_Scalar,
)
def nonlinear(node: fx.Node, want: Want) -> Outcome:
    """Barrier: gelu, silu, sigmoid, tanh, exp, pow do not commute with a factor."""
    return Barrier(f"{_op_name(node)} is nonlinear")


@rule(aten.scaled_dot_product_attention.default)
def attention(node: fx.Node, want: Want) -> Outcome:
    """To v, per head channel: rows of the softmax sum to 1, so shifts pass too. Grouped-query heads share theirs."""
    tied = _tied(want, [want.scale.ndim - 2], "attention mixes tokens, which have to share their factors")
    if tied is not None:
        return tied
    value = node.args[2]
    assert isinstance(value, fx.Node)
    heads, kv_heads = (static(shape_of(n)[-3]) if len(shape_of(n)) >= 3 else 1 for n in (node, value))
    if heads == kv_heads or not want.varies(want.scale.ndim - 3):
        return Push([(value, want)])
    if not heads or not kv_heads or heads % kv_heads:
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
    """(a, 0) to the right operand's columns."""
    right = node.args[1]
    assert isinstance(right, fx.Node)
    if want.offset.any():
        return Barrier("a constant shift cannot pass a matrix product")
    if len(shape_of(right)) < 2 or want.scale.ndim < len(shape_of(right)):
        return Barrier("a product with a vector has no channels to scale")
    tied = _tied(want, [want.scale.ndim - 2], "a matrix product mixes tokens, which have to share their factors")
    if tied is not None:
        return tied
    pushed = _elementwise(node, right, want)
    return Push(pushed) if pushed else _cannot_broadcast(node)


# --- layout ---------------------------------------------------------------------------------------------------------


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


@rule(
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten._to_copy.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.dropout.default,
    aten.lift_fresh_copy.default,
)
def same(node: fx.Node, want: Want) -> Outcome:
    """to, clone, contiguous, alias, dropout (eval): the same."""
    if not _source(node).meta["val"].is_floating_point():
        return Barrier("the value is not floating-point before this cast")
    return Push([(_source(node), want)])


@rule(
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.default,
    aten.squeeze.dims,
)
def reshape(node: fx.Node, want: Want) -> Outcome:
    """view, reshape, flatten, unflatten, unsqueeze, squeeze: the same, in the new layout."""
    moved = reshape_back(want, shape_of(node), shape_of(_source(node)))
    return Barrier("a reshape mixes the channels with the batch") if moved is None else Push([(_source(node), moved)])


@rule(aten.permute.default, aten.transpose.int, aten.t.default, aten.movedim.int)
def permute(node: fx.Node, want: Want) -> Outcome:
    """permute, transpose, t, movedim: the same, in the new layout."""
    arguments: tuple[Any, ...] = node.args
    rank = want.scale.ndim
    order = list(range(rank))
    if node.target is aten.permute.default:
        order = [axis % rank for axis in arguments[1]]
    elif node.target is aten.movedim.int:
        start, end = (axis % rank for axis in arguments[1:3])
        order.insert(end, order.pop(start))
    else:
        first, second = (axis % rank for axis in (arguments[1:3] if node.target is aten.transpose.int else (0, 1)))
        order[first], order[second] = order[second], order[first]
    inverse = np.argsort(order)
    return Push([(_source(node), want.map(lambda array: array.transpose(inverse)))])


@rule(aten.expand.default)
def expand(node: fx.Node, want: Want) -> Outcome:
    """The same, where the want does not differ along what was expanded."""
    pushed = _elementwise(node, _source(node), want)
    return Push(pushed) if pushed else Barrier("the channels are copies of one value (expand)")


@rule(operator.getitem)
def getitem(node: fx.Node, want: Want) -> Outcome:
    """The same part of what chunk, split or unbind took apart; the other parts stay."""
    parts, number = _source(node), node.args[1]
    takes_apart = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes)
    if parts.target not in (aten.unbind.int, *takes_apart):
        return Barrier(f"{_op_name(parts)} has no channel rule")
    assert isinstance(number, int)
    source = _source(parts)
    if parts.target is aten.unbind.int:
        axis = _axis(source, _argument(parts, 1, "dim", 0))
        whole = static(shape_of(source)[axis])
        if whole is None:
            return Barrier("the batch is taken apart")
        return Push([(source, embed(want.map(lambda array: np.expand_dims(array, axis)), axis, number, 1, whole))])
    axis = _axis(source, _argument(parts, 2, "dim", 0))
    lengths = [static(part.shape[axis]) for part in parts.meta["val"]]
    whole = static(shape_of(source)[axis])
    if whole is None or None in lengths:
        return Barrier("the batch is taken apart")
    start = sum(length for length in lengths[:number] if length is not None)
    length = lengths[number]
    assert length is not None
    return Push([(source, embed(stretch(want, axis, length), axis, start, 1, whole))])


@rule(aten.slice.Tensor, aten.select.int, aten.narrow.default)
def part(node: fx.Node, want: Want) -> Outcome:
    """slice, select, narrow: the same part of the source; the other parts stay."""
    source = _source(node)
    axis = _axis(source, _argument(node, 1, "dim", 0))
    whole = static(shape_of(source)[axis])
    if node.target is aten.select.int:
        if whole is None:
            return Barrier("one sample is selected from the batch")
        if not isinstance(node.args[2], int):
            return Barrier("what is selected depends on the input")
        index = node.args[2] % whole
        return Push([(source, embed(want.map(lambda array: np.expand_dims(array, axis)), axis, index, 1, whole))])
    start = _argument(node, 2, "start", 0) or 0
    step = _argument(node, 4, "step", 1) if node.target is aten.slice.Tensor else 1
    length = shape_of(node)[axis]
    if str(length) == str(shape_of(source)[axis]):
        return Push([(source, want)])
    if whole is None or static(length) is None or not isinstance(start, int):
        return Barrier("part of the batch is taken")
    start = min(start % whole if start < 0 else start, whole)
    return Push([(source, embed(stretch(want, axis, length), axis, start, step, whole))])


@rule(aten.cat.default)
def cat(node: fx.Node, want: Want) -> Outcome:
    """Along tokens to every operand, along channels to each its part."""
    operands = node.args[0]
    axis = _axis(node, _argument(node, 1, "dim", 0))
    pushed = []
    start = 0
    for operand in operands:  # type: ignore[union-attr]
        assert isinstance(operand, fx.Node)
        length = static(shape_of(operand)[axis])
        if not want.varies(axis):
            pushed.append((operand, want))
        elif length is None:
            return Barrier("samples of the batch are concatenated")
        else:
            place = (slice(None),) * axis + (slice(start, start + length),)
            piece = want.map(lambda array, place=place: array[place])  # type: ignore[misc]
            pushed.append((operand, compress(piece)))
            start += length
    return Push(pushed)
