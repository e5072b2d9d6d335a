"""Steps that add elementwise ops, and ops without a rule."""

from __future__ import annotations

import operator
from random import Random

import torch
from torch import fx

from tests.fuzz.blocks import CAST, like
from tests.fuzz.builder import Builder, shape

aten = torch.ops.aten


def number(b: Builder, r: Random, x: fx.Node) -> None:
    """Add arithmetic with a number, in one of the two overloads that graphs use."""
    name = r.choice(["add", "sub", "mul", "div"])
    overload = r.choice(["Scalar", "Tensor"])
    value = r.choice([1, 1.0, -0.5, 0.7, 2])
    alpha = {"alpha": 2} if name in ("add", "sub") and r.random() < 1 / 6 else {}
    b.call(getattr(getattr(aten, name), overload), x, value, **alpha)


def two(b: Builder, r: Random, x: fx.Node) -> None:
    """Add a sum, difference or product of two values, possibly of a value with itself."""
    op = r.choice([aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.add.Tensor])
    y = like(b, r, x)
    pair = (x, y) if r.random() < 1 / 2 else (y, x)
    alpha = {"alpha": 2} if op is not aten.mul.Tensor and r.random() < 1 / 6 else {}
    b.call(op, *pair, **alpha)


def several(b: Builder, r: Random, x: fx.Node) -> None:
    """Add addcmul, a quotient, or where or masked_fill with a mask."""
    kind = r.randint(0, 3)
    if kind == 0:
        value = {"value": 0.5} if r.random() < 1 / 2 else {}
        b.call(aten.addcmul.default, *r.sample([x, like(b, r, x), like(b, r, x)], 3), **value)
    elif kind == 1:
        y = like(b, r, x)
        b.call(aten.div.Tensor, x, b.call(aten.add.Scalar, b.call(aten.mul.Tensor, y, y), 1.0))
    else:
        mask = b.call(aten.gt.Scalar, like(b, r, x), 0.1)
        if kind == 2:
            b.call(aten.where.self, mask, *r.sample([x, like(b, r, x)], 2))
        else:
            b.call(aten.masked_fill.Scalar, x, mask, r.choice([0, 0, 1]))


POINTWISE = [
    aten.relu, aten.neg, aten.leaky_relu, aten.silu, aten.gelu, aten.tanh, aten.sigmoid,
    aten.clone, aten.alias, aten.detach, aten.contiguous, aten.lift_fresh_copy,
    aten.abs, aten.sin,
]  # fmt: skip


def pointwise(b: Builder, r: Random, x: fx.Node) -> None:
    """Add an op of one value; the last two, exp and pow, have no rule."""
    kind = r.randint(0, len(POINTWISE) + 1)
    if kind < len(POINTWISE):
        b.call(POINTWISE[kind].default, x)
    elif kind == len(POINTWISE):
        b.call(aten.exp.default, b.call(aten.tanh.default, x))
    else:
        b.call(aten.pow.Tensor_Scalar, b.call(aten.tanh.default, x), r.choice([2, 3.0]))


def cast(b: Builder, r: Random, x: fx.Node) -> None:
    """Add a cast that changes nothing, in one of its forms, or a dropout."""
    kind = r.randint(0, 5)
    if kind == 0:
        b.call(aten.to.dtype, x, torch.float64)
    elif kind == 1:
        b.call(aten.to.device, x, torch.device("cpu"), torch.float64)
    elif kind == 2:
        b.call(aten.to.dtype_layout, x, **CAST)
    elif kind == 3:
        b.call(aten._to_copy.default, x, **CAST)
    elif kind == 4:
        b.call(aten.dropout.default, x, r.choice([0.0, 0.1]), r.random() < 1 / 3)
    else:
        b.call(aten.type_as.default, x, r.choice(b.values))


def reduced(b: Builder, r: Random, x: fx.Node) -> None:
    """Add an op without a rule that reads a whole value."""
    kind = r.randint(0, 2)
    if kind == 0:
        b.call(aten.cumsum.default, x, -1)
    elif kind == 1 and len(shape(x)) > 2:
        b.call(aten.mean.dim, x, [1])
    elif len(shape(x)) > 2:
        b.call(operator.getitem, b.call(aten.max.dim, x, -1), 0)


STEPS = [*[number] * 2, *[two] * 3, *[several] * 2, *[pointwise] * 2, cast, reduced]
