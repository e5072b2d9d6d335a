"""A graph in float64: tensors, dtypes among the arguments of ops, and recorded shapes.

Two graphs that are equal in real arithmetic differ by rounding only when they are run, and in float64 this is so little
that any other difference shows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from fxquant.ir.proofs import prove
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.tensors import copy_graph, fake_mode_of, get_tensor, read_tensors, set_tensor

_NARROWER = (torch.float32, torch.float16, torch.bfloat16)


def in_float64(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph in which every floating-point value is float64, also those that the model casts to float32.

    Args:
        module: A graph with real tensors. It does not change.
    """
    made = copy_graph(module)
    for target, tensor in read_tensors(made).items():
        if tensor.dtype in _NARROWER:
            set_tensor(made, target, tensor.detach().double())
    mode, rewriter = fake_mode_of(made.graph), Rewriter(made, "float64")
    for node in made.graph.nodes:
        if node.op == "call_function":
            node.args, node.kwargs = map_aggregate(node.args, _wider), map_aggregate(node.kwargs, _wider)
            node.meta["val"] = rewriter.infer(node)
            prove(node)
        elif node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor):
            with mode:
                node.meta["val"] = as_float64(node.meta["val"])
        elif node.op == "get_attr":
            node.meta["val"] = mode.from_tensor(get_tensor(made, str(node.target)), static_shapes=True)
    made.recompile()
    return made


def as_float64(value: Any) -> Any:
    """A tensor of narrower floating-point numbers as float64; everything else as it is."""
    return value.double() if isinstance(value, Tensor) and value.dtype in _NARROWER else value


def _wider(argument: Any) -> Any:
    return torch.float64 if argument in _NARROWER and isinstance(argument, torch.dtype) else argument
