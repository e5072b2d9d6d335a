"""The matrix products of a graph that are neither layers nor part of attention, and why they stay float.

Together with the layers and the attentions of a plan, they are all products and convolutions of the model. So every
product that stays float is reported.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from fxquant.ir.arguments import args
from fxquant.ir.attention import attention_products
from fxquant.ir.dataflow import reached
from fxquant.ir.layers import LAYER_OPS
from fxquant.ir.meta import LAYER
from fxquant.ir.names import base_name
from fxquant.ir.source_lines import source_line

aten = torch.ops.aten

_PRODUCTS = frozenset(
    [
        *("matmul", "linalg_matmul", "mm", "bmm", "mv", "dot", "vdot", "inner", "outer", "ger", "linalg_vecdot"),
        *("addmm", "addbmm", "baddbmm", "addmv", "addr", "einsum", "tensordot", "bilinear", "chain_matmul"),
        *("linalg_multi_dot", "linear", "conv1d", "conv2d", "conv3d", "convolution", "_convolution", "conv_tbc"),
        *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "lstm", "gru", "rnn_tanh", "rnn_relu"),
        *("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell", "scaled_dot_product_attention", "cdist"),
        *("matrix_power", "linalg_matrix_power", "kron", "_scaled_mm", "_int_mm", "_grouped_mm"),
    ]
)


@dataclass(frozen=True, eq=False)
class Product:
    """One matrix product or convolution that stays float.

    Attributes:
        name: Path of its module, its op and its line of code, such as ``blocks.0.attn.matmul:53``. Ops of one line
            share a name, so that the names in all graphs of one model agree, whatever the order of the ops.
        op: Its op, such as ``matmul``.
        reason: Why it stays float.
    """

    name: str
    op: str
    reason: str


def find_products(graph: fx.Graph) -> list[Product]:
    """All products and convolutions that are neither layers nor part of an attention, in the order of the graph."""
    products = [node for node in graph.nodes if LAYER not in node.meta and base_name(node.target) in _PRODUCTS]
    attention = attention_products(graph) if products else set()
    inputs = reached(graph, lambda node: node.op == "placeholder") if products else set()
    return [
        Product(_name(node), base_name(node.target), _reason(node, inputs))
        for node in products
        if node not in attention and not (base_name(node.target) == "einsum" and len(args(node).tensors) < 2)
    ]


def _reason(node: fx.Node, inputs: set[fx.Node]) -> str:
    op = base_name(node.target)
    if node.target in LAYER_OPS:
        return "its weight is computed in the graph, so there is no weight to store in few bits"
    if "transpose" in op:
        return "transposed convolutions are not quantized"
    if op.startswith(("lstm", "gru", "rnn")):
        return "recurrent layers are not quantized"
    factors = [factor for factor in node.all_input_nodes if isinstance(factor.meta.get("val"), torch.Tensor)]
    activations = sum(factor in inputs for factor in factors)
    if not activations:
        return "it multiplies constants"
    if activations == 1 and len(factors) > 1 and op != "bilinear":  # It multiplies two, maybe the same one twice.
        return f"it multiplies by a weight as {op}; linear is quantized (torch.nn.Linear or torch.nn.functional.linear)"
    return "it is a product of two activations, but no softmax attention"


def _name(node: fx.Node) -> str:
    modules = [str(path) for path, _ in node.meta.get("nn_module_stack", {}).values()]
    place = f"{modules[-1]}.{base_name(node.target)}" if modules and modules[-1] else base_name(node.target)
    line = source_line(node)
    return f"{place}:{line.line}" if line else place
