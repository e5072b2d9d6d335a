"""What ranks do in the tests of tensor parallelism."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import fxquant
from fxquant.parallel import styles
from fxquant.pipeline.backend import resolve_backend
from fxquant.planning.plan import tensor_bytes
from fxquant.testing.models import calibration, tiny_flux
from tests.parallel.models import Blocks, Odd, quantized


def outputs_of(rank: int, size: int, folders: Sequence[tuple[str, Sequence[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """Load each model, make it tensor-parallel, and make calls of it.

    Returns:
        Of each model: ``outputs`` of the calls, ``bytes`` of the linears' codes of the whole model and of this rank,
        ``graphs``, their number after the calls, and ``errors``, messages of what is refused.
    """
    mesh = init_device_mesh("cpu", (size,))
    styles.LARGE = 0  # Float layers of tiny models are divided as well.
    found = []
    for folder, calls in folders:
        whole = fxquant.load(folder, backend="fake-quant")
        model = fxquant.parallelize(whole, mesh)
        outputs = []
        for number, call in enumerate(calls):
            with torch.inference_mode() if number % 2 else torch.no_grad():
                outputs.append(model(**call).sample)
        linears = {f"{name}.weight_packed" for name, layer in whole.plan.layers.items() if layer.kind == "linear"}
        sizes = tuple(
            tensor_bytes({name: tensor for name, tensor in held.tensors().items() if name in linears})
            for held in (whole, model)
        )
        found.append({"outputs": outputs, "bytes": sizes, "graphs": len(model.graphs), "errors": _refusals(model)})
    dist.destroy_process_group()
    return found


def _refusals(model: Any) -> dict[str, str]:
    """What a tensor-parallel model refuses: the type of the error and its message, by what was tried."""
    tried = {
        "save": lambda: fxquant.save(model, "never"),
        "dtype": lambda: model.to(torch.bfloat16),
        "again": lambda: fxquant.parallelize(model, model.parallel.mesh),
    }
    found = {}
    for what, attempt in tried.items():
        try:
            attempt()
        except fxquant.FxquantError as error:
            found[what] = f"{type(error).__name__}: {error}"
    return found


def edges(rank: int, size: int) -> dict[str, Any]:
    """Models whose layers are used twice or do not fit, and what :func:`fxquant.parallelize` refuses.

    Returns:
        ``outputs``: of each model that of two ranks and that of one process. ``errors``: messages of refusals.
    """
    mesh = init_device_mesh("cpu", (size,))
    outputs = {}
    for name, options in {"twice": {"times": 2}, "heads": {"heads": 3}, "odd": {"hidden": 33}}.items():
        torch.manual_seed(0)
        model = quantized(Blocks(**options))
        call = {"x": torch.randn(3, 7, 24), "timestep": torch.rand(3)}
        part = fxquant.parallelize(model, mesh)
        seen: list[Any] = []
        part.register_forward_hook(lambda *_, to=seen: to.append(1))
        with torch.no_grad():
            outputs[name] = part(**call), model(**call)
            copy.deepcopy(part)(**call)
        assert seen == [1, 1, 1]  # The model that was given shares its hooks, and copies have the same.
        assert all(tensor.to_local() is not None for tensor in part.parallel.dtensors().values())
    tried = {
        "two dimensions": lambda: (model, init_device_mesh("cpu", (1, size), mesh_dim_names=("dp", "tp"))),
        "one rank": lambda: (model, init_device_mesh("cpu", (size, 1), mesh_dim_names=("a", "b"))["b"]),
        "another device": lambda: (model, _of_device(mesh, "cuda")),
        "nothing divides": lambda: (quantized(Odd(), width=5), mesh),
        "other weights": lambda: (quantized(Blocks(hidden=32, seed=rank)), mesh),
        "context parallelism": lambda: (_with_context_parallelism(size), mesh),
        "another backend": lambda: (_of_backend(model, "native"), mesh),
    }
    errors = {}
    for what, make in tried.items():
        try:
            fxquant.parallelize(*make())
        except fxquant.FxquantError as error:
            errors[what] = f"{type(error).__name__}: {error}"
    dist.destroy_process_group()
    return {"outputs": outputs, "errors": errors}


def _of_backend(model: Any, backend: str) -> Any:
    """A copy that another backend runs, as the refusal sees it; compiling for one takes long."""
    changed = copy.copy(model)
    changed.backend = resolve_backend(backend)
    return changed


def _of_device(mesh: Any, device: str) -> Any:
    changed = copy.copy(mesh)
    changed._device_type = device
    return changed


def _with_context_parallelism(size: int) -> Any:
    """Quantize a float model that diffusers divided by tokens."""
    from diffusers import ContextParallelConfig

    model = tiny_flux()
    with mock.patch.object(torch.accelerator, "device_count", return_value=1):  # diffusers divides by it.
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=size))  # type: ignore[operator]
    return fxquant.compile(model, recipe="dynamic-w8a8", calibrate=calibration(model))
