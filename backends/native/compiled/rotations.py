"""Lowers rotations of channels to fast Walsh-Hadamard transforms, with the quantization that follows them."""

from __future__ import annotations

import torch
from torch import fx

from fxquant.backends.native.library import FLOATS
from fxquant.backends.native.tensors import only_reader
from fxquant.ir.arguments import args
from fxquant.ir.rewriter import Rewriter

reference, native = torch.ops.fxquant, torch.ops.fxquant_native


def lower(graph: fx.Graph, rewriter: Rewriter) -> None:
    """Replace rotations by kernels.

    Before::

        y = fxquant.hadamard(x, signs, block)
        codes = fxquant_native.quantize(y, s, z, 255)

    After::

        codes = fxquant_native.hadamard_quantize(x, signs, block, s, z, 255)

    A rotation that others read as well becomes ``fxquant_native.hadamard``. Rotations of float64 stay as they are.
    """
    for node in list(graph.nodes):
        if node.target is not reference.hadamard.default or node.meta["val"].dtype not in FLOATS:
            continue
        given = args(node).x, args(node).signs, args(node).block
        codes = only_reader(node)
        if codes is not None and codes.target is native.quantize.default and args(codes).x is node:
            grid = args(codes).scale, args(codes).zero_point, args(codes).qmax
            with rewriter.before(codes):
                new = rewriter.call(native.hadamard_quantize.default, (*given, *grid), [node, codes], layer=True)
            rewriter.replace(codes, new)
            rewriter.erase(node)
            continue
        with rewriter.before(node):
            new = rewriter.call(native.hadamard.default, given, [node], layer=True)
        rewriter.replace(node, new)
