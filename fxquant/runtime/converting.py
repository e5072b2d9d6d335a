"""Converts a quantized model to another floating-point dtype: graphs are made anew from the plan, codes stay."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from fxquant.capture.calls import CallSpec, TensorSpec
from fxquant.capture.state import cast, kept_tensors
from fxquant.capture.trace import Architecture
from fxquant.ir.tensors import read_tensors, weights_and_buffers
from fxquant.planning.plan import tensor_bytes
from fxquant.runtime.replay import bind_all, lower_all, model_from_plan

if TYPE_CHECKING:
    from fxquant.runtime.model import GraphModel


def converted(model: GraphModel, dtype: torch.dtype, device: torch.device) -> GraphModel:
    """The same quantized model, computing in another dtype, lowered for a device. The model itself stays as it is.

    Codes, scales and ranges are those that were found in the dtype before. Tensors that are not quantized are rounded
    to the new dtype.

    Raises:
        BackendError: If the backend does not run in this dtype or on the device.
    """
    assert model.plan is not None and model.backend is not None
    before = model.dtype
    skeleton = model.architecture.skeleton
    shared = {id(tensor): tensor for _, tensor in (*weights_and_buffers(skeleton), *kept_tensors(skeleton))}
    architecture = Architecture(copy.deepcopy(skeleton, shared), model.architecture.timestep)  # cast replaces tensors.
    others = {
        name: tensor.dtype for name, tensor in weights_and_buffers(architecture.skeleton) if tensor.dtype != before
    }
    cast(architecture.skeleton, dtype, others)
    plan = copy.deepcopy(model.plan)
    plan.calls = [_in_dtype(call, before, dtype) for call in plan.calls]
    backend = model.backend.on(device)
    backend.check_device(device)
    backend.check(plan)
    made = model_from_plan(architecture, plan, backend, dtype, device)
    wanted = {name: held.dtype for graph in made.captured for name, held in read_tensors(graph.module).items()}
    stored = model.stored_tensors()
    bind_all(made, {name: tensor.to(device, wanted.get(name, tensor.dtype)) for name, tensor in stored.items()})
    lower_all(made)
    plan.bytes_after = tensor_bytes(made.tensors())
    return made


def _in_dtype(call: CallSpec, before: torch.dtype, dtype: torch.dtype) -> CallSpec:
    """The same kind of call with its floating-point inputs in another dtype."""
    leaves = [
        replace(leaf, dtype=dtype)
        if isinstance(leaf, TensorSpec) and leaf.dtype == before and not leaf.number
        else leaf
        for leaf in call.leaves
    ]
    return replace(call, leaves=tuple(leaves))
