"""The file of a checkpoint that holds the LoRAs of a model; the file of the plan describes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fxquant.adapters.saving import from_saved, to_saved
from fxquant.disk.files import blaming, load_tensors, write_tensors
from fxquant.runtime.lora import adapters_of, made_adapters
from fxquant.runtime.model import GraphModel

ADAPTERS_FILE = "adapters.safetensors"


def write_adapters(model: GraphModel, folder: Path) -> dict[str, Any] | None:
    """Write the LoRAs of a model; returns their description, or None if it has none and nothing was written."""
    found = adapters_of(model)
    saved = None if found is None else to_saved(found)
    if saved is None:
        return None
    tensors, description = saved
    write_tensors(tensors, folder / ADAPTERS_FILE)
    return description


def read_adapters(model: GraphModel, folder: Path, description: Mapping[str, Any]) -> None:
    """Load the LoRAs of a checkpoint into the model that was read from it.

    Raises:
        CheckpointError: If they do not fit their description or the model.
    """
    tensors = load_tensors(folder / ADAPTERS_FILE, torch.device("cpu"))
    with blaming(folder / ADAPTERS_FILE):
        from_saved(made_adapters(model), tensors, description)
