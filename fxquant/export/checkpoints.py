"""Writes tensors as a model folder of diffusers, whose config says how they are quantized."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fxquant.capture.rebuilding import config_text
from fxquant.disk.files import write_tensors
from fxquant.disk.folders import whole_folder
from fxquant.export.limits import refuse_full

CONFIG_FILE = "config.json"
TENSORS_FILE = "diffusion_pytorch_model.safetensors"


def write_checkpoint(
    model: nn.Module, tensors: Mapping[str, Tensor], quantization: Mapping[str, Any], folder: str | Path
) -> Path:
    """Write a folder with ``config.json`` and one file of tensors, completely or not at all.

    Args:
        model: A model of the class, whose config is written.
        tensors: The tensors by name.
        quantization: The entry ``quantization_config`` of the config.
        folder: A new or empty folder.

    Returns:
        The folder.

    Raises:
        CheckpointError: If the folder exists and is not empty.
        WriteError: If it cannot be written.
    """
    config = {"_class_name": type(model).__name__, **json.loads(config_text(model))}
    config["quantization_config"] = dict(quantization)
    folder = Path(folder).resolve()
    with whole_folder(folder, refuse_full) as written:
        write_tensors(tensors, written / TENSORS_FILE)
        (written / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return folder


def linears(model: nn.Module) -> list[str]:
    """Names of all linears of a model."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
