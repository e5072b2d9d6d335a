"""The highest codes of activations, which may depend on the timestep, as an op of their own, for backends."""

from __future__ import annotations

import torch
from torch import fx

from fxquant.ir.arguments import args
from fxquant.ir.rewriter import Rewriter


def separate_tops(graph: fx.Graph, rewriter: Rewriter) -> None:
    """Let kernels quantize up to the highest code of a format, and lower the codes behind them.

    Before::

        codes = fxquant.quantize(x, s, z, "int8", None, top)

    After::

        codes = minimum(fxquant.quantize(x, s, z, "int8"), top)

    Both are the same codes, because a smaller upper end of a clamp can be applied after it.
    """
    for node in list(graph.nodes):
        if node.target is not torch.ops.fxquant.quantize.default or args(node).top is None:
            continue
        given = args(node)
        with rewriter.before(node):
            whole = (given.x, given.scale, given.zero_point, given.format)
            codes = rewriter.call(node.target, whole, [node], name=node.name, layer=True)
            new = rewriter.call(torch.ops.aten.minimum.default, (codes, given.top), [node], layer=True)
        rewriter.replace(node, new)
