"""Steps that add elementwise ops, and ops without a rule."""

from __future__ import annotations

import operator
from typing import Any

import torch
from hypothesis import strategies as st
from torch import fx

from tests.fuzz.blocks import CAST, like
from tests.fuzz.builder import Builder, shape

aten = torch.ops.aten


def number(b: Builder, draw: Any, x: fx.Node) -> None:
    """With a number, in either of the two ways in which graphs write it."""
    name = draw(st.sampled_from(["add", "sub", "mul", "div"]))
    overload = draw(st.sampled_from(["Scalar", "Tensor"]))
    value = draw(st.sampled_from([1, 1.0, -0.5, 0.7, 2]))
    alpha = {"alpha": 2} if name in ("add", "sub") and draw(st.integers(0, 5)) == 0 else {}
    b.call(getattr(getattr(aten, name), overload), x, value, **alpha)


def two(b: Builder, draw: Any, x: fx.Node) -> None:
    """Sums, differences and products, of a value with itself among them."""
    op = draw(st.sampled_from([aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.add.Tensor]))
    y = like(b, draw, x)
    pair = (x, y) if draw(st.booleans()) else (y, x)
    alpha = {"alpha": 2} if op is not aten.mul.Tensor and draw(st.integers(0, 5)) == 0 else {}
    b.call(op, *pair, **alpha)


def several(b: Builder, draw: Any, x: fx.Node) -> None:
    """Addcmul, quotients, choices and fillings by a mask."""
    kind = draw(st.integers(0, 3))
    if kind == 0:
        value = {"value": 0.5} if draw(st.booleans()) else {}
        b.call(aten.addcmul.default, *draw(st.permutations([x, like(b, draw, x), like(b, draw, x)])), **value)
    elif kind == 1:
        y = like(b, draw, x)
        b.call(aten.div.Tensor, x, b.call(aten.add.Scalar, b.call(aten.mul.Tensor, y, y), 1.0))
    else:
        mask = b.call(aten.gt.Scalar, like(b, draw, x), 0.1)
        if kind == 2:
            b.call(aten.where.self, mask, *draw(st.permutations([x, like(b, draw, x)])))
        else:
            b.call(aten.masked_fill.Scalar, x, mask, draw(st.sampled_from([0, 0, 1])))


POINTWISE = [
    aten.relu, aten.neg, aten.leaky_relu, aten.silu, aten.gelu, aten.tanh, aten.sigmoid,
    aten.clone, aten.alias, aten.detach, aten.contiguous, aten.lift_fresh_copy,
    aten.abs, aten.sin,
]  # fmt: skip


def pointwise(b: Builder, draw: Any, x: fx.Node) -> None:
    """Of one value; the last two have no rule."""
    kind = draw(st.integers(0, len(POINTWISE) + 1))
    if kind < len(POINTWISE):
        b.call(POINTWISE[kind].default, x)
    elif kind == len(POINTWISE):
        b.call(aten.exp.default, b.call(aten.tanh.default, x))
    else:
        b.call(aten.pow.Tensor_Scalar, b.call(aten.tanh.default, x), draw(st.sampled_from([2, 3.0])))


def cast(b: Builder, draw: Any, x: fx.Node) -> None:
    """Casts that change nothing, in every form."""
    kind = draw(st.integers(0, 5))
    if kind == 0:
        b.call(aten.to.dtype, x, torch.float64)
    elif kind == 1:
        b.call(aten.to.device, x, torch.device("cpu"), torch.float64)
    elif kind == 2:
        b.call(aten.to.dtype_layout, x, **CAST)
    elif kind == 3:
        b.call(aten._to_copy.default, x, **CAST)
    elif kind == 4:
        b.call(aten.dropout.default, x, 0.1, False)
    else:
        b.call(aten.type_as.default, x, draw(st.sampled_from(b.values)))


def reduced(b: Builder, draw: Any, x: fx.Node) -> None:
    """Ops without a rule that read all of a value."""
    kind = draw(st.integers(0, 2))
    if kind == 0:
        b.call(aten.cumsum.default, x, -1)
    elif kind == 1 and len(shape(x)) > 2:
        b.call(aten.mean.dim, x, [1])
    elif len(shape(x)) > 2:
        b.call(operator.getitem, b.call(aten.max.dim, x, -1), 0)


STEPS = [*[number] * 2, *[two] * 3, *[several] * 2, *[pointwise] * 2, cast, reduced]
