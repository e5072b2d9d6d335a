"""Models that are only traced: graphs that read the weights of the original and compute what it computes."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fxquant.capture.calls import Call
from fxquant.capture.fidelity import Original
from fxquant.capture.graph import CapturedGraph
from fxquant.capture.state import cast, kept_tensors
from fxquant.capture.trace import Architecture
from fxquant.ir.tensors import bind, weights_and_buffers
from fxquant.runtime.converting import dtypes_in
from fxquant.runtime.float_model import dtype_of
from fxquant.runtime.model import GraphModel


def traced(model: nn.Module, timestep: str | None) -> GraphModel:
    """A model whose graphs are captured from a float model when calls need them, and compared with it.

    Args:
        model: The float model in evaluation mode. Its weights are shared.
        timestep: Name of the ``forward`` argument that holds the timestep, or None.
    """
    architecture = Architecture.of(model, timestep)
    original = Original(model, timestep)
    # The weights are not detached: if the inputs are not contiguous and the weights require gradients, torch multiplies
    # in a different order, and the last bits differ.
    weights = dict(weights_and_buffers(model))

    def make_graph(owner: GraphModel, call: Call) -> CapturedGraph:
        original.warm(call)
        captured = architecture.capture(call, [graph.call for graph in owner.captured])
        bind(captured.module, {**owner.weights, **owner.tensors()})
        for leaf in call.leaves:
            if isinstance(leaf, Tensor):  # The original weights stay on the device where the model was traced.
                captured.module.to(leaf.device)
                break
        original.compare(captured, call)
        return captured

    return GraphModel(architecture, dtype_of(model), None, make_graph, weights=weights)


def retraced(made: GraphModel, dtype: torch.dtype, device: torch.device) -> GraphModel:
    """A traced model in another dtype, with weights of its own. The model and its original stay as they are."""
    skeleton = made.architecture.skeleton
    held = {**made.weights, **made.tensors()}
    memo: dict[int, Tensor] = {id(tensor): tensor for _, tensor in kept_tensors(skeleton)}
    for name, tensor in weights_and_buffers(skeleton):
        value = held.get(name, tensor).detach().to(device)
        memo[id(tensor)] = nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
    model = copy.deepcopy(skeleton, memo)
    cast(model, dtype, dtypes_in(made, dtype))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(held[name].requires_grad)
    return traced(model, made.architecture.timestep)
