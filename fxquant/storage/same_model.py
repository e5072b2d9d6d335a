"""Whether the model that loading builds is the one that was quantized."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib.metadata import version
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from fxquant.capture.graph import CapturedGraph
from fxquant.capture.rebuilding import is_rebuilt, rebuilt
from fxquant.capture.state import cast, kept_tensors
from fxquant.disk.files import dtype_name
from fxquant.errors import CaptureError, CheckpointError, QualityWarning
from fxquant.ir.digest import graph_digest
from fxquant.ir.tensors import read_tensors, weights_and_buffers
from fxquant.runtime.devices import traced_on
from fxquant.runtime.model import GraphModel
from fxquant.storage.aot.model import CONFIG_FILE


def why_not_rebuilt(model: GraphModel) -> str | None:
    """What differs between a model and the one that loading builds from its class and config; None if nothing differs.

    Also None for models whose class cannot be built from a config: they are loaded with an instance.
    """
    skeleton = model.architecture.skeleton
    if not is_rebuilt(skeleton):
        return None
    try:
        architecture = rebuilt(skeleton, model.architecture.timestep)
        cast(architecture.skeleton, model.dtype, other_dtypes(model))
        for captured in model.lasting:
            again = architecture.capture_spec(captured.call, traced_on(captured.module))
            difference = _other_kept(read_tensors(again.module), dict(kept_tensors(skeleton)))
            if difference is not None:
                return difference
            if again.code != captured.code:
                return _first_difference(captured, again)
    except CaptureError as error:
        return f"the model that they give cannot be traced: {error.reason}"
    except CheckpointError as error:
        return str(error)
    return None


def _first_difference(captured: CapturedGraph, again: CapturedGraph) -> str:
    """The path of the module at which the graph of a rebuilt model first differs, with possible causes."""
    pairs = zip_longest(captured.code, again.code)
    number = next(number for number, (left, right) in enumerate(pairs) if left != right)
    nodes = list(again.module.graph.nodes)
    stack = list(nodes[min(number, len(nodes) - 1)].meta.get("nn_module_stack", {}).values())
    where = stack[-1][0] if stack and stack[-1][0] else "the model"
    return (
        f"{where} was changed after it was constructed: its code, its options, or a cache that a call filled (in the "
        "last case, compile a model that was not called before)"
    )


def _other_kept(made: Mapping[str, Tensor], had: Mapping[str, Tensor]) -> str | None:
    """Describe the first tensor in an attribute that a graph reads and the rebuilt model has in another form."""
    for name in made.keys() & had.keys():
        left, right = had[name], made[name]
        if (left.shape, left.dtype) != (right.shape, right.dtype):
            return (
                f"tensor {name!r} is {dtype_name(left.dtype)}{list(left.shape)}, and its class makes "
                f"{dtype_name(right.dtype)}{list(right.shape)}"
            )
    return None


def other_dtypes(model: GraphModel) -> dict[str, torch.dtype]:
    """Dtypes of the original's floating-point tensors that differ from the dtype of the model.

    For tensors in attributes, which conversions of a model do not change: dtypes that differ from float32.
    """
    skeleton = model.architecture.skeleton
    found = {name: tensor.dtype for name, tensor in weights_and_buffers(skeleton) if tensor.dtype != model.dtype}
    found |= {name: tensor.dtype for name, tensor in kept_tensors(skeleton) if tensor.dtype != torch.float32}
    return {name: dtype for name, dtype in found.items() if dtype.is_floating_point}


def versions() -> dict[str, str]:
    """Versions of the packages on which the graph of a model depends."""
    return {name: version(name) for name in ("torch", "diffusers")}


def compare_graphs(quantized: GraphModel, data: Mapping[str, Any], model: Any) -> None:
    """Compare the graphs with those that were quantized: the code of a model may have changed, or its config.

    Raises:
        CheckpointError: If the graphs differ, but the versions of the packages that traced them do not.
    """
    # Earlier files describe graphs of one batch size as traced with an open batch, including ops that do nothing.
    before = data.get("digests") is None
    recorded, made_with = data.get("graphs" if before else "digests"), data.get("made_with")
    if not recorded:
        return
    pairs = zip(quantized.captured, recorded, strict=False)
    alike = all(_has_digest(captured, digest) or (before and captured.static_batch) for captured, digest in pairs)
    if alike and len(recorded) == len(quantized.captured):
        return
    if model is None and made_with == versions():
        raise CheckpointError(
            f"the model that {CONFIG_FILE} and the plan describe computes something else than the one that was "
            "quantized: one of these files was edited. Copy the checkpoint again"
        )
    told = ", ".join(f"{name} {number}" for name, number in (made_with or {}).items())
    warnings.warn(
        f"the model's code computes something else than when it was quantized (with {told}), or the same in a "
        "different way; compare some images, and quantize the model again if they differ",
        QualityWarning,
        stacklevel=3,
    )


def _has_digest(captured: CapturedGraph, digest: str) -> bool:
    """Whether a graph that is not lowered yet has this digest, or had it in files that recorded layouts too."""
    return digest in (captured.digest, graph_digest(captured.module.graph))
