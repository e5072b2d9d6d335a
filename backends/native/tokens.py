"""Codes of grids that each row finds from its own values, made in one kernel: dynamic quantization."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxquant.backends.native.library import FLOATS
from fxquant.ir.rewriter import Rewriter

aten, reference = torch.ops.aten, torch.ops.fxquant


def lower_tokens(node: fx.Node, rewriter: Rewriter, op: Any, *rest: Any) -> None:
    """Codes on the grids of their rows, with these grids, from one kernel, where only linears read them.

    Before::

        grid = fxquant.token_grid(x, 8)
        s, z = grid[0], grid[1]
        codes = fxquant.quantize(x, s, z, 0, 255, uint8)
        y = fxquant.linear(codes, s, z, ...)

    After::

        found = op(x, 255, ...)
        y = fxquant.linear(found[0], found[1], found[2], ...)

    Args:
        node: A ``fxquant.quantize``.
        rewriter: Of the graph.
        op: The kernel: returns codes, scales and zero points first.
        rest: Its arguments behind the highest code.
    """
    x, scale, zero_point, _, qmax, _ = node.args
    assert isinstance(x, fx.Node) and isinstance(scale, fx.Node) and isinstance(zero_point, fx.Node)
    grids = {_grid_of(x, scale, 0), _grid_of(x, zero_point, 1)}
    if None in grids or len(grids) != 1 or x.meta["val"].dtype not in FLOATS:
        return
    if not all(reader.target is reference.linear.default and reader.args[0] is node for reader in node.users):
        return
    if not {*scale.users, *zero_point.users} <= {node, *node.users}:
        return
    with rewriter.before(node):
        found = rewriter.call(op, (x, qmax, *rest), [scale, zero_point, node])
        parts = [rewriter.call(operator.getitem, (found, number), [node]) for number in range(3)]
    for old, part in zip((node, scale, zero_point), parts, strict=True):
        rewriter.replace(old, part)


def _grid_of(x: fx.Node, part: fx.Node, number: int) -> fx.Node | None:
    """The grid of the rows of `x` that a scale or a zero point is part of; None if it is of no such grid."""
    if part.target is not aten.select.int or part.args[1:] != (0, number):
        return None
    grid = part.args[0]
    assert isinstance(grid, fx.Node)
    return grid if grid.target is reference.token_grid.default and grid.args[0] is x else None
