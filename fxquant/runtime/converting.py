"""Converts a quantized model to another floating-point dtype: graphs are made anew from the plan, codes stay."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fxquant.capture.calls import CallSpec, TensorSpec
from fxquant.capture.state import cast, kept_tensors
from fxquant.capture.trace import Architecture
from fxquant.capture.transformers_models import is_of_transformers
from fxquant.capture.whole import own_class, whole_of
from fxquant.ir.tensors import read_tensors, weights_and_buffers
from fxquant.planning.plan import tensor_bytes
from fxquant.runtime.replay import bind_all, lower_all, model_from_plan

if TYPE_CHECKING:
    from fxquant.runtime.model import GraphModel


def converted(
    model: GraphModel, dtype: torch.dtype, device: torch.device, stored: Mapping[str, Tensor] | None = None
) -> GraphModel:
    """The same quantized model, computing in another dtype, lowered for a device. The model itself stays as it is.

    Codes and grids are those that were found in the dtype before. Tensors that are not quantized are rounded to the new
    dtype. Layers that the model's class keeps in float32 are in float32, as ``from_pretrained`` reads them.

    Args:
        model: The model.
        dtype: The dtype.
        device: The device.
        stored: Its tensors as checkpoints store them, if it is not lowered yet.

    Raises:
        BackendError: If the backend does not run on the device.
    """
    assert model.plan is not None and model.backend is not None
    architecture = _architecture(model, dtype)
    plan = copy.deepcopy(model.plan)
    plan.calls = [_in_dtype(call, model.dtype, dtype) for call in plan.calls]
    backend = model.backend.on(device)
    backend.check_device(device)
    backend.check(plan)
    made = model_from_plan(architecture, plan, backend, dtype, device)
    wanted = {name: held.dtype for graph in made.captured for name, held in read_tensors(graph.module).items()}
    stored = model.stored_tensors() if stored is None else stored
    bind_all(made, {name: tensor.to(device, wanted.get(name, tensor.dtype)) for name, tensor in stored.items()})
    lower_all(made)
    plan.bytes_after = tensor_bytes(made.tensors())
    return made


def _architecture(model: GraphModel, dtype: torch.dtype) -> Architecture:
    """The original without weights in another dtype. Tensors that it has in a dtype of their own keep it."""
    skeleton = model.architecture.skeleton
    shared = {id(tensor): tensor for _, tensor in (*weights_and_buffers(skeleton), *kept_tensors(skeleton))}
    architecture = Architecture(copy.deepcopy(skeleton, shared), model.architecture.timestep)  # cast replaces tensors.
    cast(architecture.skeleton, dtype, dtypes_in(model, dtype))
    return architecture


def dtypes_in(model: GraphModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtypes of tensors that differ from the dtype of a model when it is converted, by name."""
    skeleton = model.architecture.skeleton
    others = {name: tensor.dtype for name, tensor in weights_and_buffers(skeleton) if tensor.dtype != model.dtype}
    return others | dict.fromkeys(_kept_in_float32(skeleton, dtype), torch.float32)


def _kept_in_float32(model: nn.Module, dtype: torch.dtype) -> list[str]:
    """The tensors that ``from_pretrained`` of a model's class reads in float32 when it is asked for a 16-bit dtype.

    diffusers does so for both 16-bit dtypes, transformers for some classes in float16 only.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return []
    whole = whole_of(model)
    owner, before = (model, "") if whole is None else (whole.model_class, f"{whole.path}.")
    lists = ["_keep_in_fp32_modules_strict"]
    if dtype is torch.float16 or not is_of_transformers(own_class(model)):
        lists.append("_keep_in_fp32_modules")
    parts = {part for found in lists for part in getattr(owner, found, None) or ()}
    names = [name for name, tensor in weights_and_buffers(model) if tensor.is_floating_point()]
    return [name for name in names if any(f".{part}." in f".{before}{name}." for part in parts)]


def _in_dtype(call: CallSpec, before: torch.dtype, dtype: torch.dtype) -> CallSpec:
    """The same kind of call with its floating-point inputs in another dtype."""
    leaves = [
        replace(leaf, dtype=dtype)
        if isinstance(leaf, TensorSpec) and leaf.dtype == before and not leaf.number
        else leaf
        for leaf in call.leaves
    ]
    return replace(call, leaves=tuple(leaves))
