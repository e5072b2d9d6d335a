"""Writes the codes of a quantized model as compressed-tensors does: int8 weights, and a config that describes them.

The files hold weights only. Programs that run int8 products find the ranges of activations at run time, per token.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from fxquant.capture.rebuilding import config_text
from fxquant.disk.files import write_tensors
from fxquant.disk.folders import whole_folder
from fxquant.errors import BackendError
from fxquant.export.limits import refuse_full
from fxquant.export.weights import ClassWeights, Codes, class_weights
from fxquant.runtime.lora import refuse_loaded
from fxquant.runtime.model import GraphModel, quantized_model

CONFIG_FILE = "config.json"
TENSORS_FILE = "diffusion_pytorch_model.safetensors"


def export_compressed_tensors(model: nn.Module, folder: str | Path) -> Path:
    """Write a quantized model in the format ``int-quantized`` of compressed-tensors, in a folder as diffusers has it.

    ``config.json`` is that of the class with a ``quantization_config``. For each quantized linear the tensors are
    ``weight`` (int8 ``[out, in]``), ``weight_scale`` (``[out, groups]``) and, if its grid is not symmetric,
    ``weight_zero_point`` (int8). Codes of fewer than 8 bits take one byte each. Everything else is float.

    Args:
        model: What :func:`fxquant.compile` or :func:`fxquant.load` returned, with the backend ``fake-quant``.
        folder: A new or empty folder.

    Returns:
        The folder.

    Raises:
        ConfigurationError: If the graph is not that of the class; see :func:`~fxquant.export.weights.class_weights`.
        BackendError: If the model was lowered to another backend.
        CheckpointError: If the folder exists and is not empty.
    """
    model, _ = quantized_model(model, "export_compressed_tensors")
    refuse_loaded(model, "compressed-tensors")
    require_codes(model, "compressed-tensors")
    found = class_weights(model, "compressed-tensors")
    tensors = {name: tensor.contiguous() for name, tensor in found.floats.items()}
    for name, weight in found.codes.items():
        tensors[f"{name}.weight"] = weight.signed
        tensors[f"{name}.weight_scale"] = weight.scale
        if not weight.symmetric:
            tensors[f"{name}.weight_zero_point"] = weight.signed_zero_point
    skeleton = model.architecture.skeleton
    config = {"_class_name": type(skeleton).__name__, **json.loads(config_text(skeleton))}
    config["quantization_config"] = quantization_config(model, found)
    folder = Path(folder).resolve()
    with whole_folder(folder, refuse_full) as written:
        write_tensors(tensors, written / TENSORS_FILE)
        (written / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return folder


def require_codes(model: GraphModel, format_name: str) -> None:
    """Refuse a model whose backend repacked the codes of its weights.

    Raises:
        BackendError: Says how to load it instead.
    """
    if model.backend is not None and model.backend.name != "fake-quant":
        raise BackendError(
            f"this model was lowered to the backend {model.backend.name}, and {format_name} needs its codes; load it "
            'with fxquant.load(folder, backend="fake-quant"), or compile it with that backend'
        )


def quantization_config(model: GraphModel, found: ClassWeights) -> dict[str, Any]:
    """The entry ``quantization_config`` of the config: a group of layers for each kind of grid.

    Layers are named exactly; linears without codes are listed as ignored.
    """
    groups: dict[tuple[bool, int], list[str]] = {}
    for name, weight in found.codes.items():
        groups.setdefault((weight.symmetric, weight.group_size), []).append(name)
    linears = [name for name, module in model.architecture.skeleton.named_modules() if isinstance(module, nn.Linear)]
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
        "ignore": sorted(set(linears) - found.codes.keys()),
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
