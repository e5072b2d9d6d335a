"""Runs a quantized model tensor-parallel: each rank of a mesh holds and multiplies a part of the weights."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from fxquant.capture.graph import CapturedGraph
from fxquant.capture.hooks import hand_on_hooks
from fxquant.disk.files import digest_of
from fxquant.disk.finished_work import digest_of_tensors
from fxquant.distributed.agreement import check_alike, versions
from fxquant.distributed.team import Team
from fxquant.errors import ConfigurationError, check_type
from fxquant.parallel.cuts import Cuts
from fxquant.parallel.plan import plan_of
from fxquant.parallel.state import Parallel, bytes_of
from fxquant.runtime.given import quantized_model
from fxquant.runtime.lora import adapters_of
from fxquant.runtime.model import GraphModel

_RUNS = "fake-quant"  # The backend whose lowered graphs are the quantized graphs.


def parallelize(model: nn.Module, mesh: DeviceMesh) -> GraphModel:
    """A quantized model of which each rank of a mesh holds and computes a part.

    All ranks call this with the same model, and then make the same calls of the result, with the same inputs. It takes
    the place of the model, also in a pipeline, and returns the whole output on each rank. The model that was given
    stays as it is; drop it to free the weights that this rank does not need.

    :func:`tensor_parallel_plan` shows how each layer is divided. Codes of inputs are those of one process: ranges that
    are found at run time are those of the whole token. So outputs equal those of one process up to the rounding of sums
    in float32.

    Args:
        model: A quantized model of the backend ``fake-quant``, such as ``fxquant.load(folder, backend="fake-quant")``.
        mesh: A 1-d mesh of at least 2 ranks, such as ``init_device_mesh("cpu", (2,))``, of the device of the model.

    Returns:
        The part of this rank. Its ``parallel`` holds the plan, and ``parallel.dtensors()`` its tensors as DTensors.

    Raises:
        ConfigurationError: If the model or the mesh does not fit, or no layer can be divided.
        RanksDifferError: If the ranks have different models.
        RankError: If another rank failed.
    """
    quantized, plan = quantized_model(model, "parallelize")
    check_type("mesh", mesh, DeviceMesh, "a device mesh, as torch.distributed.device_mesh.init_device_mesh makes")
    _check_mesh(mesh, quantized)
    _check_model(quantized)
    graphs = [captured.copy() for captured in quantized.captured]
    found, styles = plan_of([captured.module.graph for captured in graphs], plan, mesh.size())
    if all(layer.style == "replicated" for layer in found.layers.values()):
        reason = next(iter(found.layers.values())).why if found.layers else "it has no quantized layers"
        raise ConfigurationError(
            f"no quantized layer of this model can be divided between {mesh.size()} ranks ({reason}); use another "
            "number of ranks, or run the model on one"
        )
    tensors = quantized.tensors()
    with Team(mesh.get_group(), quantized.runs_on) as team:
        calls = [captured.digest for captured in graphs]
        decided = {key: value for key, value in plan.checked_json().items() if key != "passes"}  # These hold times.
        same = {"plan": digest_of(decided), "kinds of call": calls, "weights": digest_of_tensors(tensors)}
        check_alike(team, {**versions(), **same})
    made = GraphModel(
        quantized.architecture, quantized.dtype, plan, quantized._make_graph, quantized.backend, shared=quantized.shared
    )
    cuts: Cuts = {}
    parallel = Parallel(found, mesh, bytes_of(tensors), cuts, {}, {})
    for captured, chosen in zip(graphs, styles, strict=True):
        parallel.divide(captured.module, chosen, False)
    parallel._parts.update({name: cut.part(tensors[name], mesh) for name, cut in cuts.items()})
    parallel._like.update({name: torch.empty_like(tensors[name], device="meta") for name in cuts})
    made.parallel = parallel
    made._make_graph = functools.partial(_further, quantized._make_graph)
    for captured in graphs:
        parallel.take_parts(captured.module)
        made.add(captured)
    hand_on_hooks(quantized, made)
    return made


def _further(make_graph: Any, owner: GraphModel, call: Any, branching: Any = None) -> CapturedGraph:
    assert isinstance(owner.parallel, Parallel)
    return owner.parallel.further(owner, make_graph, call, branching)


def _check_mesh(mesh: DeviceMesh, model: GraphModel) -> None:
    if not dist.is_initialized():
        raise ConfigurationError(
            "there is no process group; start the ranks with torchrun, and make the mesh with "
            "torch.distributed.device_mesh.init_device_mesh"
        )
    if mesh.ndim != 1:
        raise ConfigurationError(
            f"the mesh has {mesh.ndim} dimensions; give one of them, such as mesh['tp'] of a mesh with "
            "mesh_dim_names=('dp', 'tp')"
        )
    if mesh.size() < 2:
        raise ConfigurationError("the mesh has one rank; tensor parallelism needs at least 2. Call the model as it is")
    if mesh.get_coordinate() is None:
        raise ConfigurationError(f"rank {dist.get_rank()} is not in the mesh; call parallelize on its ranks only")
    if mesh.device_type != model.runs_on.type:
        raise ConfigurationError(
            f"the mesh is of {mesh.device_type} and the model is on {model.runs_on}; move the model with "
            f"to({mesh.device_type!r}), or make a mesh of {model.runs_on.type}"
        )


def _check_model(model: GraphModel) -> None:
    assert model.backend is not None
    if model.parallel is not None:
        raise ConfigurationError("this model is tensor-parallel already; give the one that it was made from")
    if model.backend.name != _RUNS:
        raise ConfigurationError(
            f"the kernels of backend {model.backend.name!r} hold whole weights in layouts of their own; load the model "
            f"for another: fxquant.load(folder, backend={_RUNS!r})"
        )
    if adapters_of(model) is not None:
        raise ConfigurationError(
            "this model has LoRAs, which are not divided; delete them with delete_adapters, or fold them into the "
            "float model"
        )
    if model._place.home is not None:
        raise ConfigurationError("this model is offloaded; end that first, with disable_group_offload or to(device)")
    if model._pieces is not None or model._compiled_call_impl is not None:
        raise ConfigurationError("this model is compiled; make it tensor-parallel first, and compile the result")
