"""Quantization of activations: with a given grid, or in one kernel in which each row finds its own grid."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxquant.backends.native.library import FLOATS
from fxquant.ir.arguments import args
from fxquant.ir.rewriter import Rewriter
from fxquant.numerics.formats import top_of

aten, reference, native = torch.ops.aten, torch.ops.fxquant, torch.ops.fxquant_native


def lower_quantize(node: fx.Node, rewriter: Rewriter) -> None:
    """Replace ``fxquant.quantize`` by the kernel that makes uint8 codes from 0."""
    given = args(node)
    arguments = (given.x, given.scale, given.zero_point, top_of(given.format))
    with rewriter.before(node):
        new = rewriter.call(native.quantize.default, arguments, [node], name=node.name, layer=True)
    rewriter.replace(node, new)


def lower_tokens(node: fx.Node, rewriter: Rewriter, op: Any, qmax: int, *rest: Any) -> None:
    """Compute codes and the grids of their rows in one kernel, if only linears read them.

    Before::

        grid = fxquant.token_grid(x, "int8")
        s, z = grid[0], grid[1]
        codes = fxquant.quantize(x, s, z, "int8")
        y = fxquant.linear(codes, s, z, ...)

    After::

        found = op(x, 255, ...)
        y = fxquant.linear(found[0], found[1], found[2], ...)

    Grids of floats are ``fxquant.token_scale(x, "fp8")``, without zero points.

    Args:
        node: A ``fxquant.quantize``.
        rewriter: The rewriter of the graph.
        op: The kernel; its first results are codes, scales and zero points.
        qmax: The highest code.
        rest: Arguments of the kernel after the highest code.
    """
    x, scale, zero_point = args(node).node("x"), args(node).node("scale"), args(node).zero_point
    old = [node, scale] if zero_point is None else [node, scale, zero_point]
    if x.meta["val"].dtype not in FLOATS or not _is_grid_of(x, *old[1:]):
        return
    if not all(reader.target is reference.linear.default and args(reader).xq is node for reader in node.users):
        return
    if not {user for part in old[1:] for user in part.users} <= {node, *node.users}:
        return
    with rewriter.before(node):
        found = rewriter.call(op, (x, qmax, *rest), [*old[1:], node], layer=True)
        parts = [rewriter.call(operator.getitem, (found, number), [node], layer=True) for number in range(len(old))]
    for before, part in zip(old, parts, strict=True):
        rewriter.replace(before, part)


def _is_grid_of(x: fx.Node, scale: fx.Node, zero_point: fx.Node | None = None) -> bool:
    """Whether a scale, with or without a zero point, is the one that the rows of `x` find for themselves."""
    if zero_point is None:
        return scale.target is reference.token_scale.default and args(scale).x is x
    grid = _grid_of(x, scale, 0)
    return grid is not None and grid is _grid_of(x, zero_point, 1)


def _grid_of(x: fx.Node, part: fx.Node, number: int) -> fx.Node | None:
    """The grid of the rows of `x` that contains this scale or zero point; None if it is not from such a grid."""
    if part.target is not aten.select.int or (args(part).dim, args(part).index) != (0, number):
        return None
    grid = args(part).node("self")
    return grid if grid.target is reference.token_grid.default and args(grid).x is x else None
