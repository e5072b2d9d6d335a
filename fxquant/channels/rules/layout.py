"""Operations that move elements without changing them."""

from __future__ import annotations

import operator

import numpy as np
import torch
from torch import fx

from fxquant.channels.layouts import compress, embed, reshape_back, static, stretch
from fxquant.channels.rules.row_sums import drops_out
from fxquant.channels.rules.table import (
    axis_of,
    cannot_broadcast,
    elementwise,
    rule,
    shape_of,
    tied,
)
from fxquant.channels.wants import Barrier, Outcome, Push, Want
from fxquant.ir import ops as _ops  # noqa: F401  (registers the ops that rules are for)
from fxquant.ir.arguments import args, item_of, source_of
from fxquant.ir.layers import is_wide_float
from fxquant.ir.names import op_name

aten = torch.ops.aten


@rule(
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten._to_copy.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten.type_as.default,
    shifts=True,
)
def same(node: fx.Node, want: Want) -> Outcome:
    """to, clone, contiguous, alias: the same."""
    if not source_of(node).meta["val"].is_floating_point():
        return Barrier("the value is not floating-point before this cast")
    if not is_wide_float(node) or not is_wide_float(source_of(node)):
        return Barrier(f"{op_name(node.target)} rounds to 8 bits")
    return Push([(source_of(node), want)])


@rule(aten.dropout.default)
def dropout(node: fx.Node, want: Want) -> Outcome:
    """dropout: (a, 0) passes, and c in evaluation."""
    if want.offset.any() and drops_out(node):
        return Barrier("a constant shift cannot pass dropout in training mode")
    return same(node, want)


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
    shifts=True,
)
def reshape(node: fx.Node, want: Want) -> Outcome:
    """view, reshape, flatten, unflatten, unsqueeze, squeeze: the same, in the new layout."""
    moved = reshape_back(want, shape_of(node), shape_of(source_of(node)))
    return Barrier("a reshape mixes the channels with the batch") if moved is None else Push([(source_of(node), moved)])


@rule(aten.permute.default, aten.transpose.int, aten.t.default, aten.mT.default, aten.movedim.int, shifts=True)
def permute(node: fx.Node, want: Want) -> Outcome:
    """permute, transpose, t, mT, movedim: the same, in the new layout."""
    rank = want.scale.ndim
    if rank < 2:
        return Push([(source_of(node), want)])
    order = list(range(rank))
    if node.target is aten.permute.default:
        order = [axis % rank for axis in args(node).dims]
    elif node.target is aten.movedim.int:
        start, end = args(node).source % rank, args(node).destination % rank
        order.insert(end, order.pop(start))
    else:
        axes = (args(node).dim0, args(node).dim1) if node.target is aten.transpose.int else (-2, -1)
        first, second = (axis % rank for axis in axes)
        order[first], order[second] = order[second], order[first]
    inverse = np.argsort(order)
    return Push([(source_of(node), want.map(lambda array: array.transpose(inverse)))])


@rule(aten.expand.default, shifts=True)
def expand(node: fx.Node, want: Want) -> Outcome:
    """The same, where the want does not differ along what was expanded."""
    pushed = elementwise(node, source_of(node), want)
    return Push(pushed) if pushed else Barrier("the channels are copies of one value (expand)")


@rule(operator.getitem, shifts=True)
def getitem(node: fx.Node, want: Want) -> Outcome:
    """The same part of what chunk, split or unbind took apart; the other parts stay."""
    parts = source_of(node)
    takes_apart = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes)
    if parts.target not in (aten.unbind.int, *takes_apart):
        return Barrier(f"{op_name(parts.target)} has no channel rule")
    number = item_of(node) % len(parts.meta["val"])
    source = source_of(parts)
    axis = axis_of(source, args(parts).dim)
    if parts.target is aten.unbind.int:
        whole = static(shape_of(source)[axis])
        if whole is None:
            return Barrier("the batch is taken apart")
        return Push([(source, embed(want.map(lambda array: np.expand_dims(array, axis)), axis, number, 1, whole))])
    lengths = [length for part in parts.meta["val"] if (length := static(part.shape[axis])) is not None]
    whole = static(shape_of(source)[axis])
    if whole is None or len(lengths) < len(parts.meta["val"]):
        return Barrier("the batch is taken apart")
    start = sum(lengths[:number])
    return Push([(source, embed(stretch(want, axis, lengths[number]), axis, start, 1, whole))])


@rule(aten.slice.Tensor, aten.select.int, aten.narrow.default, shifts=True)
def part(node: fx.Node, want: Want) -> Outcome:
    """slice, select, narrow: the same part of the source; the other parts stay."""
    source = source_of(node)
    axis = axis_of(source, args(node).dim)
    whole = static(shape_of(source)[axis])
    if node.target is aten.select.int:
        if whole is None:
            return Barrier("one sample is selected from the batch")
        index = args(node).index
        if not isinstance(index, int):
            return Barrier("what is selected depends on the input")
        index %= whole
        return Push([(source, embed(want.map(lambda array: np.expand_dims(array, axis)), axis, index, 1, whole))])
    start = args(node).start or 0
    step = args(node).step if node.target is aten.slice.Tensor else 1
    length = shape_of(node)[axis]
    if str(length) == str(shape_of(source)[axis]):
        return Push([(source, want)])
    if whole is None or static(length) is None or not isinstance(start, int):
        return Barrier("part of the batch is taken")
    start = min(max(start + whole if start < 0 else start, 0), whole)
    return Push([(source, embed(stretch(want, axis, length), axis, start, step, whole))])


@rule(aten.repeat_interleave.self_int, shifts=True)
def repeat_interleave(node: fx.Node, want: Want) -> Outcome:
    """The same; copies of one channel, as grouped-query heads make them, share theirs."""
    times, axis = args(node).repeats, args(node).dim
    if axis is None:
        return Barrier("a repetition mixes the channels with the batch")
    axis = axis_of(source_of(node), axis)
    if not want.varies(axis):
        return Push([(source_of(node), want)])
    size = static(shape_of(source_of(node))[axis])
    if size is None or not isinstance(times, int):
        return Barrier("how often channels are repeated depends on the input")
    apart = [*want.scale.shape[:axis], size, times, *want.scale.shape[axis + 1 :]]
    one = want.map(lambda array: np.take(array.reshape(apart), 0, axis=axis + 1))
    if (np.expand_dims(one.offset, axis + 1) != want.offset.reshape(apart)).any():
        return Barrier("copies of one channel ask for different constant shifts")
    every = np.broadcast_to(np.expand_dims(one.scale, axis + 1), apart)
    return Push([(source_of(node), one)], ties=[(every, want.scale.reshape(apart))])


@rule(aten.where.self)
def where(node: fx.Node, want: Want) -> Outcome:
    """To both values."""
    sides = [elementwise(node, side, want) for side in (args(node).self, args(node).other)]
    if any(not side for side in sides):
        return cannot_broadcast(node)
    return Push([pair for side in sides if side for pair in side])


@rule(aten.pad.default, aten.constant_pad_nd.default)
def pad(node: fx.Node, want: Want) -> Outcome:
    """The inner part of the source; what is padded with other values than 0 stays as it is."""
    mode = args(node).mode if node.target is aten.pad.default else "constant"
    value, amounts = args(node).value, args(node).pad
    if mode != "constant":
        return Barrier(f"padding of mode {mode} has no channel rule")
    if want.offset.any():
        return Barrier("a constant shift cannot pass padding")
    ties = []
    for number in range(len(amounts) // 2):
        axis, before, after = want.scale.ndim - 1 - number, amounts[2 * number], amounts[2 * number + 1]
        size = static(shape_of(node)[axis])
        if not want.varies(axis):
            if value and (before, after) != (0, 0):
                ties.append((want.scale, np.zeros_like(want.scale)))
            continue
        if size is None or not all(isinstance(amount, int) and amount >= 0 for amount in (before, after)):
            found = tied(want, [axis], "how many tokens are padded depends on the input, so they share their factors")
            assert found is not None
            return found
        inner = (slice(None),) * axis + (slice(before, size - after),)
        outer = [*range(before), *range(size - after, size)]
        edges = np.take(want.scale, outer, axis)
        if value:
            ties.append((edges, np.zeros_like(edges)))
        want = want.map(lambda array, inner=inner: array[inner])  # type: ignore[misc]
    return Push([(source_of(node), compress(want))], ties=ties)


@rule(aten.stack.default, shifts=True)
def stack(node: fx.Node, want: Want) -> Outcome:
    """To each operand its part."""
    axis = axis_of(node, args(node).dim)
    pushed = []
    for number, operand in enumerate(args(node).tensors):
        position = number if want.varies(axis) else 0
        pushed.append((operand, want.map(lambda array, position=position: np.take(array, position, axis=axis))))  # type: ignore[misc]
    return Push(pushed)


@rule(aten.repeat.default, aten.tile.default, shifts=True)
def repeat(node: fx.Node, want: Want) -> Outcome:
    """repeat, tile: the same; copies of one channel, as grouped-query heads make them, share theirs."""
    source = source_of(node)
    times = args(node).repeats if node.target is aten.repeat.default else args(node).dims
    rank = len(shape_of(source))
    times = [1] * (want.scale.ndim - len(times)) + list(times)
    sizes = [1] * (want.scale.ndim - rank) + list(shape_of(source))
    ties = []
    for axis, (time, size) in enumerate(zip(times, sizes, strict=True)):
        if not want.varies(axis) or str(time) == "1":
            continue
        if static(size) is None or not isinstance(time, int):
            return Barrier("how often channels are repeated depends on the input")
        apart = [*want.scale.shape[:axis], time, size, *want.scale.shape[axis + 1 :]]
        one = want.map(lambda array, apart=apart, axis=axis: np.take(array.reshape(apart), 0, axis=axis))  # type: ignore[misc]
        if (np.expand_dims(one.offset, axis) != want.offset.reshape(apart)).any():
            return Barrier("copies of one channel ask for different constant shifts")
        ties.append((np.broadcast_to(np.expand_dims(one.scale, axis), apart), want.scale.reshape(apart)))
        want = one
    moved = want.map(lambda array: array.reshape(array.shape[array.ndim - rank :]))
    return Push([(source, compress(moved))], ties=ties)


@rule(aten.roll.default, aten.flip.default, shifts=True)
def along_tokens(node: fx.Node, want: Want) -> Outcome:
    """roll, flip: the same, where the want does not differ along what they move."""
    axes = args(node).dims
    moved = {axis_of(node, axis) for axis in axes} if axes else set(range(want.scale.ndim))
    if any(want.varies(axis) for axis in moved):
        return Barrier(f"{op_name(node.target)} moves the channels")
    return Push([(source_of(node), want)])


@rule(aten.masked_fill.Scalar)
def masked_fill(node: fx.Node, want: Want) -> Outcome:
    """masked_fill with 0: (a, 0) passes."""
    if want.offset.any() or args(node).value != 0:
        return Barrier("what is filled in would have to be scaled too")
    pushed = elementwise(node, source_of(node), want)  # The mask may have more axes.
    return Push(pushed) if pushed else cannot_broadcast(node)


@rule(aten.index_select.default)
def index_select(node: fx.Node, want: Want) -> Outcome:
    """index_select: the same for every row of the table, where rows are not told apart."""
    axis = axis_of(node, args(node).dim)
    if want.varies(axis):
        return Barrier("rows that are picked by an index cannot be told apart")
    return Push([(source_of(node), want)])


@rule(aten.index.Tensor, shifts=True)
def index(node: fx.Node, want: Want) -> Outcome:
    """x[..., i, ...]: the same, for all that the indices may pick alike."""
    rank = len(shape_of(source_of(node)))
    picked = [(axis, i) for axis, i in enumerate(args(node).indices) if i is not None]
    masks = any(i.meta["val"].dtype in (torch.bool, torch.uint8) and i.meta["val"].dim() > 1 for _, i in picked)
    axes = [axis for axis, _ in picked]
    if masks or axes != list(range(axes[0], axes[0] + len(axes))):
        return Barrier("indices of several axes apart, or a mask over several, have no channel rule")
    before, after = axes[0], rank - axes[-1] - 1
    inner = range(before, want.scale.ndim - after)
    found = tied(want, inner, "what is picked by an index shares its factors")
    if found is not None:
        return found
    shape = want.scale.shape
    return Push(
        [
            (
                source_of(node),
                want.map(lambda array: array.reshape(*shape[:before], *[1] * len(axes), *shape[inner.stop :])),
            )
        ]
    )


@rule(aten.cat.default, aten.concat.default, shifts=True)
def cat(node: fx.Node, want: Want) -> Outcome:
    """Along tokens to every operand, along channels to each its part."""
    axis = axis_of(node, args(node).dim)
    pushed = []
    start = 0
    for operand in args(node).tensors:
        if shape_of(operand) == (0,) and want.scale.ndim > 1:  # cat ignores it, whatever the rank of the others.
            continue
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
