"""Store tables in few bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxquant.errors import ConfigurationError
from fxquant.ir.arguments import args
from fxquant.ir.meta import LAYER
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.stages import Stage
from fxquant.passes._quantization import quantized_weight
from fxquant.passes._rounders import RangeSearch
from fxquant.pipeline.pipeline import Pass, Tier, register_pass
from fxquant.planning.context import PassContext

aten = torch.ops.aten


@register_pass
@dataclass(frozen=True)
class QuantizeEmbeddings(Pass):
    """Store a table with one grid per row, and dequantize only the rows that are looked up.

    Before::

        y = embedding(table, labels)

    After::

        rows, s, z = embedding(packed, labels), embedding(scale, labels), embedding(zero_point, labels)
        y = fxquant.dequantize_weight(rows, s, z)

    Arithmetic stays in float. Side condition: each sample looks up one row. Rounding moves each element by at most half
    a step of its row's grid.
    """

    name: ClassVar[str] = "quantize-embeddings"
    tier: ClassVar[Tier] = Tier.LOSSY
    requires: ClassVar[Stage] = Stage.QUANTIZED
    establishes: ClassVar[Stage] = Stage.QUANTIZED
    keeps_inputs: ClassVar[bool] = True

    def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
        for node in list(graph.nodes):
            if node.target is not aten.embedding.default or LAYER not in node.meta:
                continue
            layer = context.plan.layer(node.meta[LAYER])
            if layer.weight_bits is None:
                continue
            indices = args(node).node("indices")
            if indices.meta["val"].dim() != 1:
                raise ConfigurationError(
                    f"layer {node.meta[LAYER]}: a table is stored in few bits only where each sample looks up one row; "
                    "keep it float"
                )
            w = quantized_weight(node, context, rewriter, RangeSearch.MINMAX, symmetric=False)
            tables = w.codes, w.scale, w.zero_point
            with rewriter.before(node):
                rows = [
                    None if table is None else rewriter.call(aten.embedding.default, (table, indices), [node])
                    for table in tables
                ]
                new = rewriter.call(
                    torch.ops.fxquant.dequantize_weight.default,
                    (*rows, w.format, 0, layer.shape[1], node.meta["val"].dtype),
                    sources=[node],
                    layer=True,
                )
            rewriter.replace(node, new)
