"""How a division passes back through an op: from its result to its inputs, with the arguments of one rank."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxquant.channels.layouts import runs_of_axes
from fxquant.ir.arguments import args, item_of, source_of
from fxquant.ir.names import op_name
from fxquant.numerics.formats import FORMATS
from fxquant.parallel.divisions import Division, Refine, Refused, shape_of

aten, own = torch.ops.aten, torch.ops.fxquant


@dataclass
class Passed:
    """What a rule finds.

    Attributes:
        inputs: How the inputs are divided; the others are whole.
        changed: Arguments of the op that differ on each rank, by name of its schema.
        target: Another op to call on each rank, with ``changed`` as all of its arguments behind the first; or None.
    """

    inputs: dict[fx.Node, Division] = field(default_factory=dict)
    changed: dict[str, Any] = field(default_factory=dict)
    target: Any = None


Rule = Callable[[fx.Node, Division, int], Passed]


def passed(node: fx.Node, division: Division, size: int) -> Passed:
    """What the inputs of an op must be, for its result to be divided between ``size`` ranks.

    Raises:
        Refused: If the op needs all channels along the axis, or has no rule.
        Refine: If the division needs finer runs.
    """
    if node.target is operator.getitem:
        return _item(node, division)
    rule = _RULES.get(node.target)
    if rule is not None:
        return rule(node, division, size)
    if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags:
        return _pointwise(node, division, size)
    raise Refused(f"{op_name(node.target)} is not known to keep the channels of ranks apart")


def items_of(node: fx.Node, division: Division) -> dict[fx.Node, Division]:
    """How the items of a list are divided, by the nodes that take them, if its source is divided in this way.

    Nothing for other ops.

    Raises:
        Refused: If an item would not hold whole runs.
    """
    found: dict[fx.Node, Division] = {}
    if node.target not in _LISTS:
        return found
    for reader in node.users:
        if reader.target is not operator.getitem:
            raise Refused(f"{op_name(reader.target)} reads a list of parts")
        number = item_of(reader)
        axis = _axis(args(node).dim, source_of(node))
        if node.target is aten.unbind.int:
            if axis == division.axis:
                raise Refused("its channels are taken apart one by one")
            found[reader] = division.at(division.axis - (axis < division.axis))
        elif axis != division.axis:
            found[reader] = division
        else:
            start = sum(_sizes(node)[:number])
            found[reader] = Division(axis, _between(division.runs, start, start + _sizes(node)[number]))
    return found


def aligned(node: Any, division: Division, dims: int) -> Division | None:
    """How an operand is divided that broadcasts to a value of ``dims`` axes; None if it is the same on all ranks."""
    if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    shape = shape_of(node)
    axis = division.axis - (dims - len(shape))
    return None if axis < 0 or _is(shape[axis], 1) else division.at(axis)


def broadcast(nodes: Sequence[Any], division: Division, dims: int) -> dict[fx.Node, Division]:
    """The operands among these that are divided, if they broadcast to a divided value of ``dims`` axes."""
    found = {}
    for node in nodes:
        way = aligned(node, division, dims)
        if way is not None:
            found[node] = way
    return found


def _pointwise(node: fx.Node, division: Division, size: int) -> Passed:
    return Passed(broadcast(node.all_input_nodes, division, len(shape_of(node))))


def _same(node: fx.Node, division: Division, size: int) -> Passed:
    return Passed({source_of(node): division})


def _item(node: fx.Node, division: Division) -> Passed:
    """An item of a list. The division of the list is that of its source."""
    whole = source_of(node)
    if whole.target not in _LISTS:
        raise Refused(f"{op_name(whole.target)} is not known to keep the channels of ranks apart")
    axis = _axis(args(whole).dim, source_of(whole))
    if whole.target is aten.unbind.int:
        return Passed({whole: division.at(division.axis + (axis <= division.axis))})
    if axis != division.axis:
        return Passed({whole: division})
    runs = [division.runs if number == item_of(node) else (size,) for number, size in enumerate(_sizes(whole))]
    return Passed({whole: Division(axis, sum(runs, ()))})


def _list(node: fx.Node, division: Division, size: int) -> Passed:
    source = source_of(node)
    axis = _axis(args(node).dim, source)
    if node.target is aten.unbind.int or axis != division.axis:
        return Passed({source: division})
    local = [item // size for item in _sizes(node)]
    changed = {"split_sizes": local, "dim": axis}
    return Passed({source: division}, changed, aten.split_with_sizes.default)


def _sizes(node: fx.Node) -> list[int]:
    """The sizes of the items of a list along the axis that it cuts."""
    axis = _axis(args(node).dim, source_of(node))
    return [int(item.shape[axis]) for item in node.meta["val"]]


def _between(runs: Sequence[int], start: int, end: int) -> tuple[int, ...]:
    """The runs between two positions, which must be borders of runs."""
    borders = [0]
    for run in runs:
        borders.append(borders[-1] + run)
    if start not in borders or end not in borders:
        raise Refused("a part of its channels is taken that crosses the shares of ranks")
    return tuple(runs[borders.index(start) : borders.index(end)])


def _cat(node: fx.Node, division: Division, size: int) -> Passed:
    parts = args(node).tensors
    axis = _axis(args(node).dim, node)
    if axis != division.axis:
        return Passed(dict.fromkeys(parts, division))
    sizes = [int(shape_of(part)[axis]) for part in parts]
    borders = _borders(division.runs)
    if not _borders(sizes) <= borders:
        every = sorted(_borders(sizes) | borders)
        raise Refine(tuple(right - left for left, right in zip([0, *every], every, strict=False)))
    found: dict[fx.Node, Division] = {}
    start = 0
    for part, width in zip(parts, sizes, strict=True):
        way = Division(axis, _between(division.runs, start, start + width))
        if found.setdefault(part, way) != way:
            raise Refused("one value is concatenated twice")
        start += width
    return Passed(found)


def _borders(sizes: Sequence[int]) -> set[int]:
    return {sum(sizes[: number + 1]) for number in range(len(sizes))}


def _stack(node: fx.Node, division: Division, size: int) -> Passed:
    axis = _axis(args(node).dim, node)
    if axis == division.axis:
        raise Refused("values are stacked along the divided axis")
    return Passed(dict.fromkeys(args(node).tensors, division.at(division.axis - (axis < division.axis))))


def _reshape(node: fx.Node, division: Division, size: int) -> Passed:
    source = source_of(node)
    output, before = shape_of(node), shape_of(source)
    for out_axes, src_axes in runs_of_axes(list(output), list(before)) or ():
        if division.axis in out_axes:
            inner = [output[axis] for axis in out_axes if axis > division.axis]
            outer = [output[axis] for axis in out_axes if axis < division.axis]
            wide = [axis for axis in src_axes if not _is(before[axis], 1)]
            if any(not _is(width, 1) for width in outer) or not wide:
                raise Refused("heads or channels become part of another axis")
            rest = [before[axis] for axis in wide[1:]]
            if not all(isinstance(width, int) for width in (*inner, *rest, before[wide[0]])):
                raise Refused("heads or channels become part of the batch")
            way = division.at(wide[0]).scaled(math.prod(inner), math.prod(rest))
            return Passed({source: way}, _local_sizes(node, division, size))
    raise Refused("its shape changes in a way that is not known")


def _local_sizes(node: fx.Node, division: Division, size: int) -> dict[str, Any]:
    """The arguments of a reshape in which the size along the divided axis is that of one rank."""
    if node.target is aten.flatten.using_ints:
        return {}
    names: dict[Any, str] = {aten.unflatten.int: "sizes", aten.reshape.default: "shape"}
    name = names.get(node.target, "size")
    sizes = list(getattr(args(node), name))
    first = _axis(args(node).dim, source_of(node)) if node.target is aten.unflatten.int else 0
    place = division.axis - first
    if 0 <= place < len(sizes) and isinstance(sizes[place], int) and sizes[place] > 0:
        sizes[place] //= size
    return {name: sizes}


def _permute(node: fx.Node, division: Division, size: int) -> Passed:
    dims = args(node).dims
    return Passed({source_of(node): division.at(_axis(dims[division.axis], node))})


def _transpose(node: fx.Node, division: Division, size: int) -> Passed:
    first, second = (_axis(dim, node) for dim in (args(node).dim0, args(node).dim1))
    return Passed({source_of(node): division.at({first: second, second: first}.get(division.axis, division.axis))})


def _unsqueeze(node: fx.Node, division: Division, size: int) -> Passed:
    axis = _axis(args(node).dim, node)
    return Passed({source_of(node): division.at(division.axis - (axis < division.axis))})


def _squeeze(node: fx.Node, division: Division, size: int) -> Passed:
    axis = _axis(args(node).dim, source_of(node))
    gone = _is(shape_of(source_of(node))[axis], 1)
    return Passed({source_of(node): division.at(division.axis + (gone and axis <= division.axis))})


def _select(node: fx.Node, division: Division, size: int) -> Passed:
    axis = _axis(args(node).dim, source_of(node))
    return Passed({source_of(node): division.at(division.axis + (axis <= division.axis))})


def _off_axis(node: fx.Node, division: Division, size: int) -> Passed:
    """Ops that treat each position of other axes alike."""
    if _axis(args(node).dim, source_of(node)) == division.axis:
        raise Refused(f"{op_name(node.target)} needs all channels")
    return Passed({source_of(node): division})


def _expand(node: fx.Node, division: Division, size: int) -> Passed:
    sizes = list(args(node).size)
    if sizes[division.axis] != -1:
        sizes[division.axis] //= size
    return Passed(broadcast([source_of(node)], division, len(sizes)), {"size": sizes})


def _norm(node: fx.Node, division: Division, size: int) -> Passed:
    if division.axis >= len(shape_of(node)) - len(args(node).normalized_shape):
        raise Refused("a norm needs all of its channels")
    return Passed({source_of(node): division})


def _reduce(node: fx.Node, division: Division, size: int) -> Passed:
    dims = args(node).dim
    source = source_of(node)
    if not dims or not args(node).keepdim or division.axis in {_axis(dim, source) for dim in dims}:
        raise Refused(f"{op_name(node.target)} needs all channels")
    return Passed({source: division})


def _attention(node: fx.Node, division: Division, size: int) -> Passed:
    given = args(node)
    dims = len(shape_of(node))
    if division.axis != dims - 3 or dims != 4:
        raise Refused("the attention is not divided by heads")
    heads = int(shape_of(node)[-3])
    found = {given.query: division}
    for side in (given.key, given.value):
        found[side] = division.scaled(int(shape_of(side)[-3]), heads)
    return Passed(found | broadcast([given.attn_mask], division, dims))


def _matmul(node: fx.Node, division: Division, size: int) -> Passed:
    if division.axis >= len(shape_of(node)) - 2:
        raise Refused("a product of activations is not divided by heads")
    return Passed(broadcast(node.all_input_nodes, division, len(shape_of(node))))


def _quantize(node: fx.Node, division: Division, size: int) -> Passed:
    given = args(node)
    dims, block = len(shape_of(node)), FORMATS[given.format].block
    if not block or division.axis != dims - 1:
        return Passed(broadcast(node.all_input_nodes, division, dims))
    _check_blocks(division, block, size)
    return Passed({given.x: division, given.scale: division.scaled(1, block)})


def _block_scale(node: fx.Node, division: Division, size: int) -> Passed:
    given = args(node)
    if division.axis != len(shape_of(node)) - 1:
        return Passed(broadcast(node.all_input_nodes, division, len(shape_of(node))))
    return Passed({given.x: division.scaled(FORMATS[given.format].block)})


def _hadamard(node: fx.Node, division: Division, size: int) -> Passed:
    given = args(node)
    if division.axis != len(shape_of(node)) - 1:
        return Passed({given.x: division})
    if any(run // size % given.block for run in division.runs):
        raise Refused(f"a rotation at run time (Hadamard) mixes {given.block} channels of several ranks")
    return Passed({given.x: division, given.signs: division.at(0)})


def _check_blocks(division: Division, block: int, size: int) -> None:
    if any(run // size % block for run in division.runs):
        raise Refused(f"blocks of {block} channels with one scale would be on several ranks")


def _axis(dim: int, node: fx.Node) -> int:
    value = node.meta["val"]
    return dim % (value.dim() if isinstance(value, torch.Tensor) else value[0].dim())


def _is(size: Any, number: int) -> bool:
    return isinstance(size, int) and size == number


_LISTS = {aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int}

_RULES: dict[Any, Rule] = {
    **dict.fromkeys(
        [
            *(aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default, aten.contiguous.default),
            *(aten.clone.default, aten.detach.default, aten.alias.default, aten.dropout.default, aten.type_as.default),
        ],
        _same,
    ),
    **dict.fromkeys(_LISTS, _list),
    **dict.fromkeys(
        [
            *(aten.view.default, aten.reshape.default, aten._unsafe_view.default),
            *(aten.flatten.using_ints, aten.unflatten.int),
        ],
        _reshape,
    ),
    **dict.fromkeys(
        [aten.softmax.int, aten._softmax.default, aten.slice.Tensor, aten.repeat_interleave.self_int], _off_axis
    ),
    **dict.fromkeys([aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default], _reduce),
    **dict.fromkeys([aten.layer_norm.default, aten.rms_norm.default], _norm),
    **dict.fromkeys([aten.matmul.default, aten.bmm.default, own.matmul.default], _matmul),
    own.channel_affine.default: _pointwise,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dim: _squeeze,
    aten.select.int: _select,
    aten.expand.default: _expand,
    aten.scaled_dot_product_attention.default: _attention,
    own.quantize.default: _quantize,
    own.block_scale.default: _block_scale,
    own.hadamard.default: _hadamard,
}
