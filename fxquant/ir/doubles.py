"""A graph in float64 or float32: tensors, dtypes among the arguments of ops, and recorded shapes.

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

_HALVES = (torch.float16, torch.bfloat16)
_NARROWER = {torch.float32: _HALVES, torch.float64: (torch.float32, *_HALVES)}


def in_float64(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph in which every floating-point value is float64, also those that the model casts to float32.

    Args:
        module: A graph with real tensors. It does not change.
    """
    return widened(module, torch.float64)


def widened(module: fx.GraphModule, dtype: torch.dtype) -> fx.GraphModule:
    """A copy of a graph in which no floating-point value is narrower than ``dtype``, which is float32 or float64.

    Args:
        module: A graph with real tensors. It does not change.
        dtype: The dtype of values that are narrower now.
    """
    made = copy_graph(module)
    for target, tensor in read_tensors(made).items():
        if tensor.dtype in _NARROWER[dtype]:
            set_tensor(made, target, tensor.detach().to(dtype))
    mode, rewriter = fake_mode_of(made.graph), Rewriter(made, "widened")

    def wider(argument: Any) -> Any:
        return dtype if isinstance(argument, torch.dtype) and argument in _NARROWER[dtype] else argument

    for node in made.graph.nodes:
        if node.op == "call_function":
            node.args, node.kwargs = map_aggregate(node.args, wider), map_aggregate(node.kwargs, wider)
            node.meta["val"] = rewriter.infer(node)
            prove(node)
        elif node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor):
            with mode:
                node.meta["val"] = as_wide(node.meta["val"], dtype)
        elif node.op == "get_attr":
            node.meta["val"] = mode.from_tensor(get_tensor(made, str(node.target)), static_shapes=True)
    made.recompile()
    return made


def as_wide(value: Any, dtype: torch.dtype) -> Any:
    """A tensor of floating-point numbers narrower than ``dtype`` in that dtype; everything else as it is."""
    return value.to(dtype) if isinstance(value, Tensor) and value.dtype in _NARROWER[dtype] else value
