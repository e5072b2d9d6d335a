"""Writes a float pipeline as diffusers does, completely or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fxquant.disk.files import share
from fxquant.disk.folders import whole_folder
from fxquant.storage.pipeline_folders import refuse_existing


def save_float_pipeline(pipe: Any, folder: str | Path) -> None:
    """Write a ``DiffusionPipeline`` to a new or empty folder.

    Raises:
        CheckpointError: If the folder exists and is not empty.
        WriteError: If it cannot be written; nothing is left then.
    """
    with whole_folder(Path(folder).resolve(), lambda path: refuse_existing(path, False)) as written:
        pipe.save_pretrained(written)
        share(*written.rglob("*.safetensors"))
