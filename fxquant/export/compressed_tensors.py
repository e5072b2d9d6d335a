"""Writes the codes of a quantized model as compressed-tensors does: int8 weights, and a config that describes them.

The files hold weights only. Programs that run int8 products find the ranges of activations at run time, per token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from fxquant.export.checkpoints import linears, write_checkpoint
from fxquant.export.weights import ClassWeights, Codes, codes_for, refuse_floats
from fxquant.runtime.model import GraphModel


def export_compressed_tensors(model: nn.Module, folder: str | Path, *, original: nn.Module | None = None) -> Path:
    """Write a quantized model in the format ``int-quantized`` of compressed-tensors, in a folder as diffusers has it.

    ``config.json`` is that of the class with a ``quantization_config``. For each quantized linear the tensors are
    ``weight`` (int8 ``[out, in]``), ``weight_scale`` (``[out, groups]``) and, if its grid is not symmetric,
    ``weight_zero_point`` (int8). Codes of fewer than 8 bits take one byte each. Everything else is float.

    Args:
        model: What :func:`fxquant.compile` or :func:`fxquant.load` returned, with the backend ``fake-quant``.
        folder: A new or empty folder.
        original: The float model. Tensors that no call reads, because the class does not use them, are taken from it.

    Returns:
        The folder.

    Raises:
        ConfigurationError: If the graph is not that of the class; see :func:`~fxquant.export.weights.class_weights`.
        BackendError: If the model was lowered to another backend.
        CheckpointError: If the folder exists and is not empty.
    """
    model, found = codes_for(model, "export_compressed_tensors", "compressed-tensors", original)
    refuse_floats(found, "compressed-tensors")
    tensors = {name: tensor.contiguous() for name, tensor in found.floats.items()}
    for name, weight in found.codes.items():
        tensors[f"{name}.weight"] = weight.signed
        tensors[f"{name}.weight_scale"] = weight.scale
        if not weight.symmetric:
            tensors[f"{name}.weight_zero_point"] = weight.signed_zero_point
    config = quantization_config(model, found)
    return write_checkpoint(model.architecture.skeleton, tensors, config, folder)


def quantization_config(model: GraphModel, found: ClassWeights) -> dict[str, Any]:
    """The entry ``quantization_config`` of the config: a group of layers for each kind of grid.

    Layers are named exactly; linears without codes are listed as ignored.
    """
    groups: dict[tuple[bool, int], list[str]] = {}
    for name, weight in found.codes.items():
        groups.setdefault((weight.symmetric, weight.group_size), []).append(name)
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {
                "targets": sorted(names),
                "weights": _weights(found.codes[names[0]]),
                "input_activations": _ACTIVATIONS,
                "output_activations": None,
            }
            for number, (_, names) in enumerate(groups.items())
        },
        "ignore": sorted(set(linears(model.architecture.skeleton)) - found.codes.keys()),
    }


_ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def _weights(weight: Codes) -> dict[str, Any]:
    grouped = bool(weight.group_size)
    return {
        "num_bits": 8,
        "type": "int",
        "symmetric": weight.symmetric,
        "strategy": "group" if grouped else "channel",
        "group_size": weight.group_size if grouped else None,
        "dynamic": False,
    }
