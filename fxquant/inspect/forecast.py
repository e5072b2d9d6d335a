"""What a conversion will take: sizes from the headers of files, and estimates of memory and time.

Nothing is loaded, traced or calibrated. A recipe decides about layers from a graph, and there is none yet. So layers
are told apart by names: a matrix in a numbered module belongs to a block. Therefore the sizes are estimates.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fxquant.errors import ConfigurationError
from fxquant.inspect.sizes import weight_bytes
from fxquant.pipeline.recipes import Recipe
from fxquant.planning.branches import factor_bytes
from fxquant.planning.decisions import LayerPlan
from fxquant.planning.precision import Precision, precision_of
from fxquant.storage.agreement import Header
from fxquant.storage.weights import headers_of

_BLOCK = re.compile(r"\.\d+\.")
_EMBEDDER = re.compile(r"embed|time|caption|context|guidance|label")
_MODULATION = re.compile(r"norm|adaln|(?<![a-z])mod(ulation)?(?![a-z])")
_FILE = re.compile(r"(?P<stem>[^.]+?)(\.(?P<variant>\w+))?(-\d+-of-\d+)?\.safetensors")
_IMPORTS = 0.65e9  # Bytes of a process that imported torch, diffusers and transformers.
_COPY = 0.95  # Float weights that balancing holds once more, as a share of all.
_MOMENTS = 0.55  # Second moments of GPTQ, as a share of the float weights.
_SECONDS = (0.3, 0.013, 4.0)
"""Seconds once, per layer, and per 1e9 parameters, on two CPU cores behind the calibration; see benchmarks/results.

What a layer takes beside the arithmetic on its weights was measured on a narrow model of 28 blocks. It hardly depends
on the recipe.
"""
_SECONDS_FOLDED = (0.3, 0.013, 22.5)
_SECONDS_GPTQ = (0.3, 0.013, 215.0)
_UNKNOWN = ("adaround", "reconstruct", "split-low-rank", "choose-variants", "weigh-timesteps", "bin-bits")
"""Learns, factorizes weights or runs calibration calls again, whose time depends on the machine most."""

HOW = {
    "float_bytes": "sum of the tensors in the headers of the files, in the dtype of the conversion",
    "quantized_bytes": "the same, with the recipe's bits, scales, zero points and low-rank branches for matrices in "
    "numbered modules, 8 bits for embedders with layers=default, and float for the rest; tables over timesteps are "
    "not included",
    "peak_bytes": "0.65 GB for imports, all parts of the pipeline, and beside each float part the quantized one, or a "
    "float copy where the recipe balances; activations and calibration statistics come on top",
    "calls": "batches of samples times steps; seconds of calibration are this number times those of one call",
    "convert_seconds": "behind the calibration, as measured on two CPU cores: 4 s (with balancing 22 s, GPTQ 215 s) "
    "per 1e9 parameters, and 13 ms per layer; other machines and other work on the cores change it",
}
"""How each number is derived."""


def forecast(
    folder: Path, recipes: Mapping[str, Recipe], dtype: torch.dtype, calls: int, variant: str | None = None
) -> dict[str, Any]:
    """Estimate a conversion of parts of the pipeline in a folder.

    Args:
        folder: Folder of a float pipeline.
        recipes: The recipe of each part that is quantized, by the name of the part.
        dtype: Dtype in which the pipeline would be loaded.
        calls: Calls of the transformer in calibration.
        variant: The variant of the files; where a part has no file of it, the one that is there.

    Returns:
        ``components``: for each part ``parameters``, ``float_bytes``, ``quantized_bytes`` and ``convert_seconds``
        (None where a recipe learns roundings, factorizes weights or runs calibration calls again, whose time depends
        on the machine most). Beside it their sums under the same names, ``peak_bytes``, ``calls``, and ``how``, which
        says how each is derived.

    Raises:
        ConfigurationError: If the folder holds no pipeline with these parts in safetensors files, or a recipe does not
            assign precisions.
        CheckpointError: If a file is damaged.
    """
    held = _components(folder)
    for name in recipes:
        if name not in held:
            raise ConfigurationError(
                f"{folder / name} holds no safetensors files. --dry-run reads their headers, so give a local folder of "
                f"a float pipeline, and parts that it holds: {', '.join(held) or 'none'}"
            )
    headers = {name: _headers(folder / name, variant) for name in held}
    parts = {name: forecast_of_part(headers[name], recipe, dtype, held[name]) for name, recipe in recipes.items()}
    others = sum(_parameters(tensors) * dtype.itemsize for tensors in headers.values())
    beside = sum(bytes_beside(recipe, parts[name]) for name, recipe in recipes.items())
    seconds = [part["convert_seconds"] for part in parts.values()]
    names = ("parameters", "float_bytes", "quantized_bytes")
    return {
        **{name: sum(part[name] for part in parts.values()) for name in names},
        "peak_bytes": round(_IMPORTS + others + beside),
        "calls": calls,
        "convert_seconds": None if None in seconds else sum(seconds),
        "components": parts,
        "how": HOW,
    }


def forecast_of_part(tensors: Mapping[str, Header], recipe: Recipe, dtype: torch.dtype, library: str) -> dict[str, Any]:
    """Estimate the conversion of one part."""
    after, layers = _quantized(tensors, recipe, dtype, library)
    parameters = _parameters(tensors)
    return {
        "parameters": parameters,
        "float_bytes": parameters * dtype.itemsize,
        "quantized_bytes": after,
        "convert_seconds": _seconds(recipe, parameters, layers),
    }


def _parameters(tensors: Mapping[str, Header]) -> int:
    return sum(math.prod(header.shape) for header in tensors.values())


def bytes_beside(recipe: Recipe, part: Mapping[str, Any]) -> float:
    """Bytes that a conversion holds beside the float weights of a part."""
    copies = _COPY * _folds(recipe) + _MOMENTS * ("gptq" in str(recipe))
    return max(part["quantized_bytes"], copies * part["float_bytes"])


def forecast_text(found: Mapping[str, Any]) -> str:
    """A forecast as lines of text, with how each number is derived."""
    lines = ["estimates; nothing was loaded or written"]
    for name, part in found["components"].items():
        lines.append(_line(f"float {name}", _megabytes(part["float_bytes"]), "float_bytes"))
        lines.append(_line(f"quantized {name}", f"about {_megabytes(part['quantized_bytes'])}", "quantized_bytes"))
    seconds = found["convert_seconds"]
    learned = "not estimated for this recipe" if seconds is None else f"about {seconds:.0f} s"
    lines.append(_line("peak memory", f"about {_megabytes(found['peak_bytes'])}", "peak_bytes"))
    lines.append(_line("calibration", f"{found['calls']} calls of the float transformer", "calls"))
    lines.append(_line("conversion", learned, "convert_seconds"))
    return "\n".join(lines)


def _line(name: str, value: str, key: str) -> str:
    return f"{name:<26}{value:<40}{HOW[key]}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"


def _components(folder: Path) -> dict[str, str]:
    """The parts of a pipeline that hold tensors, with the library of the class of each."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{folder} is not the folder of a pipeline: model_index.json cannot be read. --dry-run reads headers of "
            "files, so give a local folder of a float pipeline"
        ) from error
    named = {name: str(entry[0]) for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2}
    return {name: library for name, library in named.items() if any((folder / name).glob("*.safetensors"))}


def _headers(folder: Path, variant: str | None) -> Mapping[str, Header]:
    """The headers of the tensors of a part, of one variant: the given one, else the one without a name, else any."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        matched = _FILE.fullmatch(path.name)
        found.setdefault((matched and matched["variant"]) or "", []).append(path)
    return headers_of(found.get(variant or "") or found.get("") or next(iter(found.values())))


def _quantized(tensors: Mapping[str, Header], recipe: Recipe, dtype: torch.dtype, library: str) -> tuple[int, int]:
    """Bytes of the quantized tensors, and the number of quantized layers.

    Of a VAE, all layers of the decoder are quantized by default, and calibration from prompts encodes nothing.
    """
    step: Any = next((step for step in recipe.prepare if step.name == "assign-precision"), None)
    if step is None:
        raise ConfigurationError(
            "the recipe has no pass assign-precision, so --dry-run cannot tell which layers it quantizes; put "
            "assign-precision{precision=w8a8} before the semicolon"
        )
    splits: list[Any] = [each for each in recipe.convert if each.name == "split-low-rank"]
    is_vae = library != "transformers" and {"encoder", "decoder"} <= {name.partition(".")[0] for name in tensors}
    if is_vae and step.layers == "default":
        step = replace(step, layers="all")
    total = layers = 0
    for name, header in tensors.items():
        layer = None if is_vae and not name.startswith("decoder.") else _layer(name, header, step)
        if layer is not None and library == "transformers" and layer.role == "embedder":
            layer = None  # Token embeddings of text encoders stay float.
        size = math.prod(header.shape) * dtype.itemsize
        total += size if layer is None else weight_bytes(layer, dtype)[1]
        if layer is not None:
            total += _branch_bytes(name.removesuffix(".weight"), layer, splits, dtype)
        layers += layer is not None and layer.weight_bits is not None
    return total, layers


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
    role = "adaln" if role == "block" and _MODULATION.search(layer.lower()) is not None else role
    chosen: Precision = precision_of(layer, role, Precision.parse(step.precision), step.layers, step.overrides)
    shape = [header.shape[0], math.prod(header.shape[1:])]
    group = chosen.group_size if kind == "linear" else 0
    return LayerPlan(
        *(kind, role, shape, chosen.weight_bits, chosen.activation_bits, group),
        weight_format=chosen.weight_format,
        activation_format=chosen.activation_format,
        group_rows=chosen.group_rows if kind == "linear" else 1,
    )


def _branch_bytes(name: str, layer: LayerPlan, splits: Sequence[Any], dtype: torch.dtype) -> int:
    """Bytes of the branch beside a layer, as the first pass that splits it decides."""
    step = next((each for each in splits if each.decides(name, layer)), None)
    return 0 if step is None else factor_bytes(step.branch_for(layer), layer.shape, dtype)


def _seconds(recipe: Recipe, parameters: int, layers: int) -> float | None:
    text = str(recipe)
    if any(name in text for name in _UNKNOWN):
        return None
    once, per_layer, per_billion = _SECONDS_GPTQ if "gptq" in text else _SECONDS_FOLDED if _folds(recipe) else _SECONDS
    return once + per_layer * layers + per_billion * parameters / 1e9


def _folds(recipe: Recipe) -> bool:
    """Whether the recipe balances or shifts channels, and so holds a second float copy of weights."""
    return any(step.name == "absorb-affines" for step in (*recipe.prepare, *recipe.convert))
