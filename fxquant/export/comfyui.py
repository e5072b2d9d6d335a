"""Writes the codes of a quantized model as one file in the layout that ComfyUI reads.

Facts about the layout: a quantized linear ``L`` has ``L.weight`` (int8 or float8), ``L.weight_scale`` (float32), and
``L.comfy_quant``, the bytes of a JSON object with its ``format``. The header of the file repeats these objects under
``_quantization_metadata``. Formats: ``int8_tensorwise`` (one scale per row; activations are rounded per token when the
model runs) and ``float8_e4m3fn`` (one scale; ``L.input_scale`` is that of the activations, and with
``full_precision_matrix_mult`` they stay as they are).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.disk.files import write_tensors
from fxquant.disk.folders import whole_folder
from fxquant.errors import ConfigurationError
from fxquant.export.float8 import FORMAT, float_tensors, input_scales, linears_in_blocks, rounded, scales_of
from fxquant.export.limits import refuse_full
from fxquant.export.original_names import OriginalNames
from fxquant.export.weights import ClassWeights, codes_for, rows_of
from fxquant.runtime.model import GraphModel
from fxquant.runtime.wrappers import unwrapped

FILE = "diffusion_model.safetensors"
PREFIX = "model.diffusion_model."
INT8, FLOAT8 = "int8_tensorwise", "float8_e4m3fn"
NAMES = ("comfyui", "class")
LAYOUT = "ComfyUI's layout"


@dataclass(frozen=True)
class _Layers:
    """What a file holds.

    Attributes:
        tensors: All tensors, with the scales of quantized linears.
        kinds: For each quantized linear its object of ``comfy_quant``.
    """

    tensors: dict[str, Tensor]
    kinds: dict[str, dict[str, Any]]


def export_comfyui(
    model: nn.Module,
    folder: str | Path,
    *,
    prefix: str = PREFIX,
    names: str = "comfyui",
    original: nn.Module | None = None,
) -> Path:
    """Write ``diffusion_model.safetensors`` in ComfyUI's layout: int8 or fp8 codes, or a float model in fp8.

    Of a quantized model, the codes are written: int8 with one scale per row, and ``fp8`` with one scale per layer and
    one for its input, as the precision ``wfp8afp8-tensor`` has them. With ``wfp8a16-tensor`` ComfyUI multiplies in full
    precision. Of a float model, linears inside of blocks are
    rounded to float8 (e4m3) with one scale each. If :func:`fxquant.balance` made it, linears whose inputs it has seen
    also have an input scale, so that ComfyUI multiplies in float8 where the hardware can; the others multiply in full
    precision.

    Args:
        model: A quantized model with the backend ``fake-quant``, or a float model.
        folder: A new or empty folder.
        prefix: What stands before each name.
        names: ``"comfyui"`` for the names of the model's authors, which ComfyUI reads. There, q, k and v of FLUX and
            SD3 are one linear. Or ``"class"`` for the names of the model's class in diffusers.
        original: The float model that was quantized. Tensors that no call reads, because the class does not use them,
            are taken from it.

    Returns:
        The file.

    Raises:
        ConfigurationError: If a layer has weight groups, a grid that is not symmetric about 0, a format that the layout
            lacks, ``fp8`` with several scales or with ranges of inputs that are not one for all calls; if the graph is
            not that of the class; or if ComfyUI's names of the class are not known. The message says what fits.
        BackendError: If the model was lowered to another backend.
        NonFiniteError: If a float weight holds NaN or infinity.
        CheckpointError: If the folder exists and is not empty.
    """
    if names not in NAMES:
        raise ConfigurationError(f"names={names!r} is not known; choose {' or '.join(map(repr, NAMES))}")
    model = unwrapped(model)
    found = _codes(model, names, original) if isinstance(model, GraphModel) else _float8(model, names)
    tensors = {f"{prefix}{name}": tensor.contiguous() for name, tensor in found.tensors.items()}
    kinds = {f"{prefix}{name}": kind for name, kind in found.kinds.items()}
    tensors |= {f"{name}.comfy_quant": _bytes(kind) for name, kind in kinds.items()}
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": kinds})}
    folder = Path(folder).resolve()
    with whole_folder(folder, refuse_full) as written:
        write_tensors(tensors, written / FILE, metadata)
    return folder / FILE


def _bytes(value: Any) -> Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def _renamed(model: type, tensors: Mapping[str, Tensor], names: str) -> OriginalNames | None:
    return OriginalNames(model, tensors) if names == "comfyui" else None


def _codes(model: GraphModel, names: str, original: nn.Module | None) -> _Layers:
    model, found = codes_for(model, "export_comfyui", LAYOUT, original)
    floats = {name: weight for name, weight in found.codes.items() if weight.format == FORMAT}
    integers = {name: weight for name, weight in found.codes.items() if name not in floats}
    scales = scales_of(model, floats, LAYOUT)
    tensors = rows_of(ClassWeights(integers, found.floats), LAYOUT)
    tensors |= {f"{name}.weight": weight.codes.view(torch.float8_e4m3fn) for name, weight in floats.items()}
    layers = {name: [name] for name in found.codes}
    renamed = _renamed(type(model.architecture.skeleton), tensors, names)
    if renamed is not None:
        tensors, layers = renamed.tensors(tensors), renamed.modules(list(layers))
    kinds: dict[str, dict[str, Any]] = {}
    for name, parts in layers.items():
        kinds[name] = {"format": FLOAT8 if parts[0] in floats else INT8}
        if parts[0] in floats:
            tensors[f"{name}.weight_scale"], x_scale = _only(name, [scales[part] for part in parts], parts)
            if x_scale is None:
                kinds[name]["full_precision_matrix_mult"] = True
            else:
                tensors[f"{name}.input_scale"] = x_scale
    return _Layers(tensors, kinds)


def _only(name: str, scales: list[tuple[Tensor, Tensor | None]], parts: list[str]) -> tuple[Tensor, Tensor | None]:
    """The scales of the weight and the input, if they are the same for all parts of a linear of ComfyUI."""
    if len({tuple(None if scale is None else float(scale) for scale in each) for each in scales}) > 1:
        raise ConfigurationError(
            f"ComfyUI holds {name!r} as one linear with one scale, and its parts {', '.join(parts)} have scales of "
            "their own; names='class' (--names class) writes them apart, int8 (w8a16) has a scale per row, and "
            "export_comfyui of the float model rounds them together"
        )
    return scales[0]


def _float8(model: Any, names: str) -> _Layers:
    tensors, scales = float_tensors(model), input_scales(model)
    layers = {name: [name] for name in linears_in_blocks(model)}
    renamed = _renamed(type(model), tensors, names)
    if renamed is not None:
        tensors, layers = renamed.tensors(tensors), renamed.modules(list(layers))
    kinds: dict[str, dict[str, Any]] = {}
    for name, parts in layers.items():
        tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"] = rounded(tensors[f"{name}.weight"])
        kinds[name] = {"format": FLOAT8}
        if all(part in scales for part in parts):
            tensors[f"{name}.input_scale"] = torch.stack([scales[part] for part in parts]).max()
        else:
            kinds[name]["full_precision_matrix_mult"] = True
    return _Layers(tensors, kinds)
