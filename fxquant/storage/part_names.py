"""The entry of ``config.json`` that names the quantized parts of a model with several entries, such as a VAE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fxquant.disk.files import blaming, dtype_of_name
from fxquant.errors import CheckpointError
from fxquant.runtime.parts import ENTRIES
from fxquant.schemas.common import read_json
from fxquant.storage.aot.model import CONFIG_FILE
from fxquant.storage.skeleton import QUANT_METHOD, QUANTIZATION

PARTS = "parts"
"""The entry of ``quantization_config`` that lists the quantized parts."""


def parts_in(folder: Path) -> list[str]:
    """The names of the quantized parts of the model in a folder; empty if it is no model with quantized parts.

    Raises:
        CheckpointError: If its config cannot be read, or names something that is not a part.
    """
    if not (folder / CONFIG_FILE).is_file():
        return []
    _, config = read_json(folder / CONFIG_FILE, "checkpoint")
    entry = config.get(QUANTIZATION) if isinstance(config, dict) else None
    if not isinstance(entry, dict) or entry.get("quant_method") != QUANT_METHOD or PARTS not in entry:
        return []
    return checked_names(entry[PARTS], folder / CONFIG_FILE)


def dtype_in(folder: Path) -> torch.dtype | None:
    """The dtype of the model with quantized parts in a folder; None if it holds no such model.

    Raises:
        CheckpointError: If its config is damaged.
    """
    if not parts_in(folder):
        return None
    path = folder / CONFIG_FILE
    with blaming(path):
        return dtype_of_name(read_json(path, "checkpoint")[1][QUANTIZATION].get("dtype"))


def checked_names(names: Any, where: Path | str) -> list[str]:
    """The names of parts that a config lists, which become names of folders.

    Raises:
        CheckpointError: If one of them is not the name of a part.
    """
    if not isinstance(names, list) or not names or not all(name in ENTRIES for name in names):
        raise CheckpointError(
            f"{where} does not name quantized parts: {PARTS} is a list of {' and '.join(ENTRIES)}; copy the model again"
        )
    return list(names)
