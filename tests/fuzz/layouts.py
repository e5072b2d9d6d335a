"""Steps that move elements without changing them."""

from __future__ import annotations

import math
import operator
from random import Random

import torch
from torch import fx

from tests.fuzz.builder import TOKENS, Builder, shape

aten = torch.ops.aten


def _axis(r: Random, x: fx.Node, first: int = 1) -> int:
    """An axis from `first` on, by default not the batch, counted from either end."""
    rank = len(shape(x))
    return r.choice([axis - back for axis in range(first, rank) for back in (0, rank)])


def take_apart(b: Builder, r: Random, x: fx.Node) -> None:
    """Add chunk, split or unbind; some parts are dropped."""
    axis = _axis(r, x)
    size, kind = shape(x)[axis], r.randint(0, 4)
    if kind == 0:
        parts = b.call(aten.chunk.default, x, 2, axis)
    elif kind == 1 and size > 1:
        parts = b.call(aten.split_with_sizes.default, x, [1, size - 1], axis)
    elif kind == 2 and size > 1:
        parts = b.call(aten.split.sizes, x, [size - 1, 1], axis)
    elif kind == 3 and len(shape(x)) > 2 and size <= 4:
        parts = b.call(aten.unbind.int, x, axis)
    else:
        parts = b.call(aten.split.Tensor, x, 2, axis)
    for number in range(len(parts.meta["val"])):
        if r.randint(0, 3):
            b.call(operator.getitem, parts, number)


def take_part(b: Builder, r: Random, x: fx.Node) -> None:
    """Add slice, select or narrow."""
    axis = _axis(r, x)
    size, kind = shape(x)[axis], r.randint(0, 3)
    if kind == 0 and size > 1:
        b.call(aten.narrow.default, x, axis, r.randint(0, 1), size - 1)
    elif kind == 1 and len(shape(x)) > 2:
        b.call(aten.select.int, x, axis, r.randint(-1, size - 1))
    elif kind == 2 and size > 2:
        start, stop = r.choice([0, 1, -2, None]), r.choice([size, size - 1, -1, 2**63 - 1])
        if len(range(size)[start:stop]):
            b.call(aten.slice.Tensor, x, axis, start, stop)
    else:
        b.call(aten.slice.Tensor, x, axis, r.randint(0, size - 1), size, r.choice([1, 2, 3]))


def together(b: Builder, r: Random, x: fx.Node) -> None:
    """Add stack or cat along tokens or channels, possibly with the same value twice."""
    axis = _axis(r, x)
    if r.random() < 1 / 2:
        alike = [y for y in b.values if shape(y) == shape(x)]
        if len(shape(x)) < 5:
            b.call(aten.stack.default, [x, r.choice(alike)], axis)
    else:
        same_rank = [y for y in b.values if len(shape(y)) == len(shape(x))]
        at = axis % len(shape(x))
        fitting = [y for y in same_rank if all(i == at or shape(y)[i] == size for i, size in enumerate(shape(x)))]
        op = r.choice([aten.cat, aten.concat]).default
        more = [r.choice(fitting) for _ in range(r.randint(1, 2))]
        b.call(op, [x, *more], axis)


def reshape(b: Builder, r: Random, x: fx.Node) -> None:
    """Add view, reshape, flatten, unflatten, unsqueeze, squeeze or expand."""
    rank, lead, kind = len(shape(x)), shape(x)[0], r.randint(0, 7)
    if kind in (4, 5) and rank < 5:
        x, rank = b.call(aten.unsqueeze.default, x, r.randint(1, rank)), rank + 1
    ones = [axis for axis in range(1, rank) if shape(x)[axis] == 1]
    if kind == 0 and rank > 2:
        b.call(aten.flatten.using_ints, x, r.choice([rank - 2, -2]), r.choice([rank - 1, -1]))
    elif kind == 1 and rank < 5 and shape(x)[-1] % 2 == 0:
        b.call(aten.unflatten.int, x, -1, r.choice([[2, -1], [-1, 2]]))
    elif kind <= 3:
        total = math.prod(shape(x)[1:])
        sizes = r.choice([[n, total // n] for n in range(1, total + 1) if total % n == 0])
        if kind == 2:
            b.call(aten.reshape.default, x, [lead, *sizes])
        else:
            whole = b.call(aten.contiguous.default, x)
            b.call(r.choice([aten.view, aten._unsafe_view]).default, whole, [lead, *sizes])
    elif kind == 4 and ones and rank > 2:
        op = r.choice(["dim", "dims", "default"])
        axis = r.choice(ones)
        if op == "dim":
            b.call(aten.squeeze.dim, x, axis - r.choice([0, rank]))
        elif op == "dims" and rank - len(ones) >= 2:
            b.call(aten.squeeze.dims, x, ones)
        elif op == "default" and rank - len(ones) >= 2 and lead != 1:
            b.call(aten.squeeze.default, x)
    elif kind == 5 and ones:
        sizes = [TOKENS if axis in ones else r.choice([-1, size]) for axis, size in enumerate(shape(x))]
        b.call(aten.expand.default, x, [*([2] if rank < 4 and r.random() < 1 / 6 else []), *sizes])
    elif rank < 5:
        b.call(aten.unsqueeze.default, x, r.choice([*range(1, rank + 1), -1, -2]))


def permute(b: Builder, r: Random, x: fx.Node) -> None:
    """Add permute, transpose, movedim, mT or t; sometimes the batch does not stay first."""
    rank = len(shape(x))
    first = 0 if r.random() < 1 / 5 else 1
    if rank == 2:
        b.call(r.choice([aten.t, aten.mT]).default, x) if first == 0 else b.call(aten.unsqueeze.default, x, 1)
        return
    kind = r.randint(0, 3)
    if kind == 0:
        b.call(aten.permute.default, x, [*range(first), *r.sample(range(first, rank), rank - first)])
    elif kind == 1:
        b.call(aten.transpose.int, x, _axis(r, x, first), _axis(r, x, first))
    elif kind == 2:
        b.call(aten.movedim.int, x, _axis(r, x, first), _axis(r, x, first))
    else:
        b.call(aten.mT.default, x)


def moved(b: Builder, r: Random, x: fx.Node) -> None:
    """Add roll, flip, repeat, tile, repeat_interleave, padding or indexing."""
    if math.prod(shape(x)) > 300:
        return
    rank, axis, kind = len(shape(x)), _axis(r, x), r.randint(0, 7)
    size = shape(x)[axis]
    if kind == 0:
        b.call(aten.roll.default, x, [1], [axis])
    elif kind == 1:
        b.call(aten.flip.default, x, [axis])
    elif kind == 2:
        times = [2 if i == axis % rank else 1 for i in range(rank)]
        op = r.choice([aten.repeat, aten.tile]).default
        b.call(op, x, times[1:] if op is aten.tile.default and rank > 2 and r.random() < 1 / 2 else times)
    elif kind == 3:
        b.call(aten.repeat_interleave.self_int, x, 2, axis)
    elif kind in (4, 5):
        amounts = r.choice([[1, 2], [0, 1], [-1, 1], [0, 0, 1, 0], [1, 0, 0, 2], [-1, 0]])
        if (shape(x)[-1] < 2 and min(amounts) < 0) or len(amounts) > 2 * (rank - 1):
            return
        value = r.choice([0.0, 0.0, 1.0])
        if kind == 4:
            b.call(aten.constant_pad_nd.default, x, amounts, *([value] if r.random() < 1 / 2 else []))
        elif r.random() < 1 / 5 and rank == 3 and shape(x)[-1] > 2:
            b.call(aten.pad.default, x, [1, 2], "reflect")
        else:
            b.call(aten.pad.default, x, amounts, "constant", r.choice([None, value]))
    elif kind == 6:
        b.call(aten.index_select.default, x, axis, b.tensor(torch.tensor([size - 1, 0])))
    else:
        picked = b.tensor(torch.tensor([shape(x)[1] - 1, 0, 0]))
        more = [b.tensor(torch.tensor([0, 0, shape(x)[2] - 1]))] if rank > 3 and r.random() < 1 / 2 else []
        b.call(aten.index.Tensor, x, [None, picked, *more])


STEPS = [*[take_apart] * 2, take_part, *[together] * 2, *[reshape] * 3, *[permute] * 2, *[moved] * 2]
