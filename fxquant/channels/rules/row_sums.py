"""Whether the probabilities of an attention sum to 1 over its keys: the condition for a shift of v to pass.

They do not sum to 1 if all keys of a row are masked: ``scaled_dot_product_attention`` yields 0 there, not a mean of v.
They do not either while probabilities are dropped out. A mask is judged by how the graph computes it, never by its
values, because a checkpoint is loaded without values.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.channels.layouts import static
from fxquant.channels.rules.table import axis_of, shape_of
from fxquant.ir.arguments import args, source_of
from fxquant.ir.layers import is_wide_float
from fxquant.ir.names import base_name

aten = torch.ops.aten

_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_CASTS = (
    *(aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default),
    *(aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default),
)
_MOVES = (
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints),
    *(aten.unflatten.int, aten.squeeze.dim, aten.squeeze.default, aten.squeeze.dims, aten.unsqueeze.default),
    *(aten.expand.default, aten.permute.default, aten.transpose.int, aten.repeat.default, aten.slice.Tensor),
    *(aten.select.int, aten.repeat_interleave.self_int, aten.cat.default, aten.stack.default, aten.index.Tensor),
)
_SUMS = (aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar)

Interval = tuple[float, float]


def attention_drops(node: fx.Node) -> str | None:
    """Why the rows of a ``scaled_dot_product_attention`` may not sum to 1, or None if they do."""
    if args(node).dropout_p != 0.0:
        return "attention drops out some of its probabilities, so a constant shift cannot pass it"
    if shape_of(args(node).node("key"))[-2] == 0:
        return "attention to no key at all yields 0, so a constant shift cannot pass it"
    mask = args(node).attn_mask  # Causal attention sees the first key in every row.
    if mask is None or _sees(mask, len(shape_of(mask)) - 1):
        return None
    return f"a row whose keys are all masked yields 0, which the mask {mask.name} allows: a constant shift cannot pass"


def product_drops(left: fx.Node) -> str | None:
    """Why the rows of the left factor of a matrix product may not sum to 1, or None if they do.

    Rows of a plain softmax are NaN where all keys are masked, and stay NaN.
    """
    while left.target in (*_CASTS, aten.dropout.default):
        if drops_out(left):
            return "attention drops out some of its probabilities, so a constant shift cannot pass it"
        if not is_wide_float(left):
            break
        left = source_of(left)
    over = args(left).dim if left.target in _SOFTMAX else None
    if over is None or axis_of(left, over) != len(shape_of(left)) - 1 or shape_of(left)[-1] == 0:
        return "a constant shift cannot pass a matrix product"
    return None


def drops_out(node: fx.Node) -> bool:
    """Whether a node is a dropout that is active."""
    return node.target is aten.dropout.default and args(node).train is not False and bool(args(node).p != 0)


def _sees(mask: fx.Node, axis: int) -> bool:
    """Whether the mask certainly lets at least one key along this axis through, at each position of the other axes."""
    if static(shape_of(mask)[axis]) == 0:
        return False
    bounds = _bounds(mask)
    if bounds is not None and _lets_through(bounds, mask.meta["val"].dtype):
        return True
    if mask.target in _CASTS or mask.target is aten.slice.Tensor:
        source = args(mask).node("self")
        same = str(shape_of(source)) == str(shape_of(mask)) and source.meta["val"].dtype == mask.meta["val"].dtype
        return same and _sees(source, axis)
    if mask.target is aten.cat.default:
        found = [_sees(part, axis) for part in args(mask).tensors]
        return any(found) if axis_of(mask, args(mask).dim) == axis else all(found)
    if mask.target is aten.unsqueeze.default:
        new = axis_of(mask, args(mask).dim)
        return new != axis and _sees(args(mask).node("self"), axis - (new < axis))
    if mask.target is aten.expand.default:
        source = args(mask).node("self")
        own = axis - (len(shape_of(mask)) - len(shape_of(source)))
        return own >= 0 and _sees(source, own)
    if mask.target in (aten.logical_or.default, aten.bitwise_or.Tensor):
        return any(
            str(shape_of(side)[-1:]) == str(shape_of(mask)[-1:]) and axis == len(shape_of(mask)) - 1
            and _sees(side, len(shape_of(side)) - 1)
            for side in mask.all_input_nodes
        )  # fmt: skip
    return False


def _lets_through(bounds: Interval, dtype: torch.dtype) -> bool:
    if not dtype.is_floating_point:
        return bounds[0] >= 1
    # Scores are added to the mask, and in float16 the sum of the lowest number and a score may be -inf.
    return bounds[0] >= torch.finfo(dtype).min / (2 if dtype == torch.float16 else 1)


def _bounds(node: fx.Node) -> Interval | None:
    """Lower and upper bound of the values of all elements; None if they may be infinite or nothing is known."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.is_complex():
        return None
    found = _bounds_by_op(node)
    if found is None and value.dtype == torch.bool:
        return 0.0, 1.0
    if value.dtype == torch.bool:
        return found
    limits: Any = torch.finfo(value.dtype) if value.is_floating_point() else torch.iinfo(value.dtype)
    if found is not None and not value.is_floating_point():
        found = math.trunc(found[0]), math.trunc(found[1])  # Casts to integers round toward 0.
    if found is not None and limits.min <= found[0] and found[1] <= limits.max:
        return found
    return None if value.is_floating_point() else (float(limits.min), float(limits.max))  # Integers wrap around.


def _bounds_by_op(node: fx.Node) -> Interval | None:
    target: Any = node.target
    name = base_name(node.target)
    if name in ("ones", "ones_like", "new_ones"):
        return 1.0, 1.0
    if name in ("zeros", "zeros_like", "new_zeros"):
        return 0.0, 0.0
    if name in ("full", "full_like", "new_full", "scalar_tensor"):
        return _number(args(node).s if name == "scalar_tensor" else args(node).fill_value)
    if target in _CASTS or target in _MOVES:
        sources = args(node).tensors if name in ("cat", "stack") else [source_of(node)]
        found = _hull([_bounds(source) for source in sources])
        if node.meta["val"].dtype == torch.bool:  # A cast makes True of everything that is not 0.
            return (1.0, 1.0) if found is not None and (found[0] > 0 or found[1] < 0) else (0.0, 1.0)
        return found
    if target in _SUMS:
        left, right = _operand(args(node).self), _operand(args(node).other)
        if left is None or right is None or args(node).alpha != 1:
            return None
        if name == "add":
            return left[0] + right[0], left[1] + right[1]
        left, right = (right, left) if name == "rsub" else (left, right)
        return left[0] - right[1], left[1] - right[0]
    if target in (aten.mul.Tensor, aten.mul.Scalar):
        left, right = _operand(args(node).self), _operand(args(node).other)
        products = [] if left is None or right is None else [one * other for one in left for other in right]
        return (min(products), max(products)) if products else None
    if target is aten.masked_fill.Scalar:
        return _hull([_operand(args(node).self), _operand(args(node).value)])
    if name == "where":
        return _hull([_operand(args(node).self), _operand(args(node).other)])
    return None


def _operand(argument: Any) -> Interval | None:
    return _bounds(argument) if isinstance(argument, fx.Node) else _number(argument)


def _number(value: Any) -> Interval | None:
    return (float(value), float(value)) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _hull(parts: list[Interval | None]) -> Interval | None:
    known = [part for part in parts if part is not None]
    if not known or len(known) < len(parts):
        return None
    return min(low for low, _ in known), max(high for _, high in known)
