"""What a conversion will take: sizes from the headers of files, and estimates of memory and time.

Nothing is loaded, traced or calibrated. A recipe decides about layers from a graph, and there is none yet. So layers
are told apart by names: a matrix in a numbered module belongs to a block. Therefore the sizes are estimates.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fxquant.errors import ConfigurationError
from fxquant.inspect.sizes import weight_bytes
from fxquant.pipeline.recipes import Recipe
from fxquant.planning.decisions import LayerPlan
from fxquant.planning.precision import Precision, precision_of
from fxquant.storage.agreement import Header
from fxquant.storage.weights import headers_of, weight_names

_BLOCK = re.compile(r"\.\d+\.")
_EMBEDDER = re.compile(r"embed|time|caption|context|guidance|label")
_SECONDS = 80.0  # Per 1e9 parameters, on two CPU cores, behind the calibration; see benchmarks/results/convert.md.
_SECONDS_LEARNED = {"gptq": 240.0}
_UNKNOWN = ("adaround", "reconstruct")

HOW = {
    "float_bytes": "sum of the tensors in the headers of the files, in the dtype of the conversion",
    "quantized_bytes": "the same, with the recipe's bits, scales and zero points for matrices in numbered modules, "
    "8 bits for embedders with layers=default, and float for the rest; tables over timesteps are not included",
    "peak_bytes": "all parts of the pipeline, and the quantized transformer beside the float one; activations and "
    "calibration statistics come on top",
    "calls": "batches of samples times steps; seconds of calibration are this number times those of one call",
    "convert_seconds": "80 s (GPTQ: 240 s) per 1e9 parameters behind the calibration, as measured on two CPU cores",
}
"""How each number is derived."""


def forecast(folder: Path, recipe: Recipe, dtype: torch.dtype, calls: int) -> dict[str, Any]:
    """Estimate a conversion of the pipeline in a folder.

    Args:
        folder: Folder of a float pipeline.
        recipe: The recipe.
        dtype: Dtype in which the pipeline would be loaded.
        calls: Calls of the transformer in calibration.

    Returns:
        ``float_bytes``, ``quantized_bytes``, ``peak_bytes``, ``calls``, ``convert_seconds`` (None where a recipe learns
        roundings, whose time depends on the machine most), ``parameters``, and ``how``, which says how each is derived.

    Raises:
        ConfigurationError: If the folder holds no pipeline with a transformer in safetensors files.
        CheckpointError: If a file is damaged.
    """
    tensors = _headers(folder / "transformer")
    parameters = sum(math.prod(header.shape) for header in tensors.values())
    before, after = parameters * dtype.itemsize, _quantized(tensors, recipe, dtype)
    others = [_headers(path) for path in _components(folder) if path.name != "transformer"]
    rest = sum(math.prod(header.shape) for headers in others for header in headers.values()) * dtype.itemsize
    return {
        "parameters": parameters,
        "float_bytes": before,
        "quantized_bytes": after,
        "peak_bytes": before + after + rest,
        "calls": calls,
        "convert_seconds": _seconds(recipe, parameters),
        "how": HOW,
    }


def forecast_text(found: Mapping[str, Any]) -> str:
    """A forecast as lines of text, with how each number is derived."""
    seconds = found["convert_seconds"]
    shown = {
        "float_bytes": ("float transformer", _megabytes(found["float_bytes"])),
        "quantized_bytes": ("quantized transformer", f"about {_megabytes(found['quantized_bytes'])}"),
        "peak_bytes": ("peak memory", f"about {_megabytes(found['peak_bytes'])}"),
        "calls": ("calibration", f"{found['calls']} calls of the float transformer"),
        "convert_seconds": ("conversion", "not estimated: it learns" if seconds is None else f"about {seconds:.0f} s"),
    }
    lines = [f"{name:<22}{value:<40}{found['how'][key]}" for key, (name, value) in shown.items()]
    return "\n".join(["estimates; nothing was loaded or written", *lines])


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"


def _components(folder: Path) -> list[Path]:
    """The folders of the parts of a pipeline that hold tensors."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{folder} is not the folder of a pipeline: model_index.json cannot be read"
        ) from error
    found = [folder / name for name, value in index.items() if isinstance(value, list) and (folder / name).is_dir()]
    return [path for path in found if any(path.glob("*.safetensors"))]


def _headers(folder: Path) -> Mapping[str, Header]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigurationError(
            f"{folder} holds no safetensors files. --dry-run reads their headers, so give a local folder of a float "
            "pipeline"
        )
    names = [path.name for path in files]
    if folder.name == "transformer":
        names = weight_names(names)
        variants = {name.split(".")[1] if name.count(".") > 1 else "" for name in names}
        if len(variants) > 1:  # Of several variants, the one without a name is loaded.
            names = [name for name in names if name.count(".") == 1]
    return headers_of([folder / name for name in names])


def _quantized(tensors: Mapping[str, Header], recipe: Recipe, dtype: torch.dtype) -> int:
    """Bytes of the quantized tensors."""
    step = next(step for step in recipe.prepare if step.name == "assign-precision")
    total = 0
    for name, header in tensors.items():
        layer = _layer(name, header, step)
        size = math.prod(header.shape) * dtype.itemsize
        total += size if layer is None else weight_bytes(layer, dtype)[1]
    return total


def _layer(name: str, header: Header, step: Any) -> LayerPlan | None:
    """The layer of a weight, as far as its name and shape tell; None for what is no layer, such as a bias."""
    if len(header.shape) < 2 or not name.endswith("weight"):
        return None
    layer = name.rpartition(".")[0]
    own = layer.rpartition(".")[2]
    embedder = _EMBEDDER.search(layer.lower()) is not None
    role = "embedder" if embedder else "block" if _BLOCK.search(f".{layer}.") else "final"
    kind = "conv" if len(header.shape) > 2 else "embedding" if "embedding_table" in own else "linear"
    role = "patch" if kind == "conv" and role == "embedder" else role
    chosen: Precision = precision_of(layer, role, Precision.parse(step.precision), step.layers, step.overrides)
    shape = [header.shape[0], math.prod(header.shape[1:])]
    group = chosen.group_size if kind == "linear" else 0
    return LayerPlan(kind, role, shape, chosen.weight_bits, chosen.activation_bits, group)


def _seconds(recipe: Recipe, parameters: int) -> float | None:
    text = str(recipe)
    if any(name in text for name in _UNKNOWN):
        return None
    rate = next((seconds for name, seconds in _SECONDS_LEARNED.items() if name in text), _SECONDS)
    return rate * parameters / 1e9
