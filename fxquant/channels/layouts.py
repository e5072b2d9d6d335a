"""How requests move through reshapes and broadcasts, computed from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fxquant.channels.wants import IDENTITY, UNREAD, Want

Array = npt.NDArray[np.generic]


def static(size: Any) -> int | None:
    """A size as an int, or None when it is symbolic (the open batch)."""
    return size if isinstance(size, int) else None


def reshape_back(want: Want, output: Sequence[Any], source: Sequence[Any]) -> Want | None:
    """Move a want on the result of a reshape to its source; None if it cannot be expressed there.

    Both shapes are cut into the smallest runs of axes of equal product. For example, ``[B*T, H*D]`` against
    ``[B, T, H, D]`` is cut into ``B*T | B, T`` and ``H*D | H, D``. A run along which the want does not vary keeps
    size 1. Any other run is expanded to its full size and reshaped. If the size is open, as in ``[B*H]`` against
    ``[B, H]``, the run is expanded to a period after which the want repeats.
    """
    runs = runs_of_axes(list(output), list(source))
    if runs is None:
        return None
    spread: list[int] = []
    target: list[int] = []
    for out_axes, src_axes in runs:
        if len(out_axes) == len(src_axes) == 1:
            spread.append(want.scale.shape[out_axes[0]])
            target.append(spread[-1])
        elif any(want.varies(axis) for axis in out_axes):
            asked = [want.scale.shape[axis] for axis in out_axes]
            found = _spread(asked, [output[axis] for axis in out_axes], [source[axis] for axis in src_axes])
            if found is None:
                return None
            spread += found[0]
            target += found[1]
        else:
            spread += [1] * len(out_axes)
            target += [1] * len(src_axes)

    def move(array: Array) -> Array:
        return repeated(array, spread).reshape(target)

    return compress(want.map(move))


def _spread(asked: Sequence[int], output: Sequence[Any], source: Sequence[Any]) -> tuple[list[int], list[int]] | None:
    """The shape to which a run of a want must be repeated, and its shape at the source then; None if there is none.

    Args:
        asked: Sizes of the want.
        output: Sizes of the value. Before the last open size, the want must not vary; if it varies along the open axis,
            the sizes before it must be 1.
        source: Sizes of the source.
    """
    sizes, source_sizes = [static(size) for size in output], [static(size) for size in source]
    if None not in sizes and None not in source_sizes:
        return [size for size in sizes if size is not None], [size for size in source_sizes if size is not None]
    if None not in sizes or None not in source_sizes:
        return None
    if 0 in (*sizes, *source_sizes):
        return None
    front, inner = _around_the_open(sizes)
    source_front, source_inner = _around_the_open(source_sizes)
    if any(size > 1 for size in asked[:front]) or (asked[front] > 1 and not _ones(sizes[:front])):
        return None
    period = math.lcm(asked[front] * math.prod(inner), math.prod(source_inner))
    repeats = period // math.prod(source_inner)
    if repeats > 1 and not _ones(source_sizes[:source_front]):
        return None
    spread = [*[1] * front, period // math.prod(inner), *inner]
    return spread, [*[1] * source_front, repeats, *source_inner]


def _around_the_open(sizes: Sequence[int | None]) -> tuple[int, list[int]]:
    """The position of the last open size, and the sizes after it."""
    last = max(axis for axis, size in enumerate(sizes) if size is None)
    return last, [size for size in sizes[last + 1 :] if size is not None]


def _ones(sizes: Sequence[int | None]) -> bool:
    return all(size == 1 for size in sizes)


def repeated(array: Array, shape: Sequence[int]) -> Array:
    """The array repeated along each axis to this size: from size 1, or from the period of an open axis."""
    times = [size // own if own > 1 else 1 for own, size in zip(array.shape, shape, strict=True)]
    return np.broadcast_to(np.tile(array, times) if max(times, default=1) > 1 else array, shape)


def common_shape(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape to which requests on one value are repeated for comparison; periods of an open axis may differ."""
    return tuple(math.lcm(*sizes) for sizes in zip(*shapes, strict=True))


def compress(want: Want) -> Want:
    """The same want with every axis along which it is constant reduced to size 1."""
    for axis, size in enumerate(want.scale.shape):
        if size > 1:
            first = want.map(lambda array, axis=axis: np.take(array, [0], axis=axis))  # type: ignore[misc]
            if (want.scale == first.scale).all() and (want.offset == first.offset).all():
                want = first
    return want


def broadcast_back(want: Want, operand: Sequence[Any]) -> Want | None:
    """Move a want on the result of an elementwise op to one operand, which may have been broadcast.

    None if the want differs along an axis on which the operand has a single element.
    """
    extra = want.scale.ndim - len(operand)
    if any(want.varies(axis) for axis in range(extra)):
        return None
    for axis, size in enumerate(operand):
        if static(size) == 1 and want.varies(axis + extra):
            return None
    return want.map(lambda array: array.reshape(array.shape[extra:]))


def embed(want: Want, axis: int, start: int, step: int, size: int) -> Want:
    """Turn a want on a slice along ``axis`` into a want on the whole value, whose other positions are unread.

    Args:
        want: The want on the slice; the caller has expanded it along the axis to the slice's own length.
        axis: The sliced axis, not negative.
        start: First index of the slice.
        step: Distance between indices.
        size: Size of the whole along the axis.
    """
    length = want.scale.shape[axis]
    shape = list(want.scale.shape)
    shape[axis] = size
    scale = np.full(shape, UNREAD, dtype=np.int64)
    offset = np.zeros(shape)
    place = (slice(None),) * axis + (slice(start, start + length * step, step),)
    scale[place] = want.scale
    offset[place] = want.offset
    return Want(scale, offset)


def stretch(want: Want, axis: int, size: int) -> Want:
    """The want expanded along one axis to its full size."""
    shape = list(want.scale.shape)
    shape[axis] = size
    return want.map(lambda array: np.broadcast_to(array, shape))


def spread_over_unread(want: Want) -> Want:
    """Give unread positions the want of the read ones along an axis if these agree; unread ones may yield anything."""
    for axis in range(want.scale.ndim):
        read = want.scale != UNREAD
        if want.varies(axis) and not read.all():
            first = np.expand_dims(read.argmax(axis=axis), axis)
            one = want.map(lambda array, axis=axis, first=first: np.take_along_axis(array, first, axis))  # type: ignore[misc]
            if (~read | ((want.scale == one.scale) & (want.offset == one.offset))).all():
                want = one
    return want


def settle_unread(want: Want) -> Want:
    """Like :func:`spread_over_unread`, but unread positions for which the read ones do not agree stay unchanged."""
    want = spread_over_unread(want)
    return Want(np.where(want.scale == UNREAD, IDENTITY, want.scale), want.offset)


def runs_of_axes(output: list[Any], source: list[Any]) -> list[tuple[list[int], list[int]]] | None:
    """Cut two shapes of equal product into the shortest runs of axes of equal product; None where none is found."""
    runs: list[tuple[list[int], list[int]]] = []
    o = s = 0
    while o < len(output) and s < len(source):
        out_axes, src_axes = [o], [s]
        out_product, src_product = output[o], source[s]
        o, s = o + 1, s + 1
        while not _equal(out_product, src_product):
            if _hint(out_product) < _hint(src_product) and o < len(output):
                out_product = out_product * output[o]
                out_axes.append(o)
                o += 1
            elif _hint(out_product) > _hint(src_product) and s < len(source):
                src_product = src_product * source[s]
                src_axes.append(s)
                s += 1
            else:
                return None
        runs.append((out_axes, src_axes))
    if not all(_equal(size, 1) for size in (*output[o:], *source[s:])):  # Only in a value without elements.
        return None
    if o < len(output) or s < len(source):
        runs.append((list(range(o, len(output))), list(range(s, len(source)))))
    return runs


def _equal(left: Any, right: Any) -> bool:
    return str(left) == str(right)


def _hint(size: Any) -> int:
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return int(hint) if hint is not None else 2
