"""Writes the codes of a quantized model as one file in the layout that ComfyUI reads.

Facts about the layout: a quantized linear ``L`` has ``L.weight`` (int8 or float8), ``L.weight_scale`` (float32), and
``L.comfy_quant``, the bytes of a JSON object with its ``format``. The header of the file repeats the formats under
``_quantization_metadata``. Formats: ``int8_tensorwise`` (one scale per row) and ``float8_e4m3fn`` (one scale).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fxquant.disk.files import share
from fxquant.disk.folders import whole_folder
from fxquant.errors import ConfigurationError
from fxquant.export.compressed_tensors import require_codes
from fxquant.export.limits import refuse, refuse_full
from fxquant.export.weights import IN_PLACE, class_weights
from fxquant.runtime.float_model import check_storage, check_weights
from fxquant.runtime.lora import refuse_loaded
from fxquant.runtime.model import GraphModel, quantized_model
from fxquant.runtime.wrappers import unwrapped

FILE = "diffusion_model.safetensors"
PREFIX = "model.diffusion_model."
INT8, FLOAT8 = "int8_tensorwise", "float8_e4m3fn"


def export_comfyui(model: nn.Module, folder: str | Path, *, prefix: str = PREFIX) -> Path:
    """Write ``diffusion_model.safetensors`` in ComfyUI's layout: int8 of a quantized model, or fp8 of a float one.

    Of a quantized model, the codes are written, with one scale per row. Of a float model, such as a balanced one
    (:func:`fxquant.balance`), linears inside of blocks are rounded to float8 (e4m3) with one scale each. Names are
    those of the model's class in diffusers, behind the prefix. ComfyUI reads models whose own names differ, such as
    FLUX with its fused projections, only after a conversion of names.

    Args:
        model: A quantized model with the backend ``fake-quant``, or a float model.
        folder: A new or empty folder.
        prefix: What stands before each name.

    Returns:
        The file.

    Raises:
        ConfigurationError: If a layer has weight groups or a grid that is not symmetric about 0, or the graph is not
            that of the class. The message lists layers, and a recipe that fits.
        BackendError: If the model was lowered to another backend.
        NonFiniteError: If a float weight holds NaN or infinity.
        CheckpointError: If the folder exists and is not empty.
    """
    model = unwrapped(model)
    tensors, formats = _int8(model) if isinstance(model, GraphModel) else _float8(model)
    for name, kind in formats.items():
        tensors[f"{name}.comfy_quant"] = _bytes({"format": kind})
    layers = {f"{prefix}{name}": {"format": kind} for name, kind in formats.items()}
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers}), "format": "pt"}
    folder = Path(folder).resolve()
    with whole_folder(folder, refuse_full) as written:
        save_file({f"{prefix}{name}": tensor for name, tensor in tensors.items()}, written / FILE, metadata)
        share(written / FILE)
    return folder / FILE


def _bytes(value: Any) -> Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def _int8(model: GraphModel) -> tuple[dict[str, Tensor], dict[str, str]]:
    model, _ = quantized_model(model, "export_comfyui")
    refuse_loaded(model, "ComfyUI's layout")
    require_codes(model, "ComfyUI's layout")
    found = class_weights(model, "ComfyUI's layout")
    reasons: dict[str, list[str]] = {}
    for name, weight in found.codes.items():
        if weight.group_size:
            reasons.setdefault(f"weights in groups of {weight.group_size}", []).append(name)
        elif not weight.symmetric:
            reasons.setdefault("weight grids that are not symmetric about 0", []).append(name)
    refuse("ComfyUI's layout", reasons, f"use a recipe with symmetric weights, without groups, such as\n  {IN_PLACE}")
    tensors = {name: tensor.contiguous() for name, tensor in found.floats.items()}
    for name, weight in found.codes.items():
        tensors[f"{name}.weight"] = weight.signed
        tensors[f"{name}.weight_scale"] = weight.scale.float().contiguous()
    return tensors, dict.fromkeys(found.codes, INT8)


def _float8(model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"a {type(model).__name__} is not a model; give pipe.transformer")
    check_storage(model)
    check_weights(model)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    largest = torch.finfo(torch.float8_e4m3fn).max
    formats = {}
    for name, module in model.named_modules():
        in_block = any(part.isdecimal() for part in name.split("."))
        if not isinstance(module, nn.Linear) or not in_block:
            continue
        weight = tensors[f"{name}.weight"].float()
        scale = (weight.abs().max() / largest).clamp_min(torch.finfo(torch.float32).tiny)
        tensors[f"{name}.weight"] = (weight / scale).clamp(-largest, largest).to(torch.float8_e4m3fn)
        tensors[f"{name}.weight_scale"] = scale
        formats[name] = FLOAT8
    if not formats:
        raise ConfigurationError(f"no linear of this {type(model).__name__} is inside of a numbered block")
    return tensors, formats
