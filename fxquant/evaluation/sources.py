"""Where an evaluation gets its pipelines, and which folders and which share of the work belong to this process."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from fxquant.disk.folders import no_folder
from fxquant.errors import CheckpointError, ConfigurationError
from fxquant.evaluation.store import batch_in, one_process
from fxquant.runtime.devices import usable_device
from fxquant.storage.diffusers_io import load_pipeline


def open_source(source: Any, device: str) -> Any:
    """The pipeline, which is read if it is a folder or a name, or made by a function.

    Raises:
        CheckpointError: If it cannot be read.
        ConfigurationError: If it is not a pipeline.
    """
    if isinstance(source, (str, Path)):
        pipe = load_pipeline(source, device=device)
        pipe.set_progress_bar_config(disable=True)
        return pipe
    pipe = source if hasattr(source, "components") else source()
    if not hasattr(pipe, "components"):
        raise ConfigurationError(f"{pipe!r} was given where a diffusers pipeline is expected")
    return pipe


def check_source(source: Any) -> None:
    """Refuse what is neither a pipeline, nor a folder, nor a function that returns one.

    Raises:
        CheckpointError: If a folder is not a pipeline.
        ConfigurationError: If it is something else.
    """
    if isinstance(source, (str, Path)):
        check_pipeline(source)
    elif not hasattr(source, "components") and (isinstance(source, (nn.Module, type)) or not callable(source)):
        raise ConfigurationError(
            f"a {type(source).__name__} was given where a diffusers pipeline, its folder, or a function that returns "
            "it is expected"
        )


def share_of(shard: tuple[int, int] | None, work: str | Path | None, overwrite: bool) -> tuple[tuple[int, int], bool]:
    """The share of this process, and whether it is all.

    Raises:
        ConfigurationError: If there is no such share, or the options do not allow several processes.
    """
    share = shard or (int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    if share[1] < 1:
        raise ConfigurationError(f"shard {share[0]}/{share[1]} has no shares; give one such as 0/4")
    if not 0 <= share[0] < share[1]:
        raise ConfigurationError(
            f"shard {share[0]}/{share[1]} should be from 0/{share[1]} to {share[1] - 1}/{share[1]}"
        )
    if share[1] > 1 and work is None:
        raise ConfigurationError("several processes need one folder for their images; give work=..., or --work FOLDER")
    if share[1] > 1 and overwrite:
        raise ConfigurationError("several processes cannot overwrite one folder; remove it, or give another one")
    return share, share == (0, 1)


def device_of_rank(device: str) -> str:
    """The device of this process: under ``torchrun``, ``cuda`` is the GPU of its rank.

    Raises:
        ConfigurationError: If there is no such device here.
    """
    rank = os.environ.get("LOCAL_RANK")
    found = f"cuda:{rank}" if device == "cuda" and rank is not None else device
    usable_device(found)
    return found


def check_pipeline(source: str | Path) -> None:
    """Refuse a folder that is not a pipeline, before anything slow. Names on the hub are not looked up.

    Raises:
        CheckpointError: Says what is missing.
    """
    folder = Path(source)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise CheckpointError(f"{folder} is not a pipeline, because it has no model_index.json")
    if not folder.is_dir() and (
        folder.exists() or len(str(source).strip("/").split("/")) != 2 or str(source)[0] in "./~"
    ):
        raise CheckpointError(f"{no_folder(folder)}; give a folder of a diffusers pipeline, or a name on the hub")


@contextmanager
def folder_of_float(folder: Path, float_work: str | Path | None, share: tuple[int, int]) -> Iterator[Path]:
    """Keep other processes away from both folders; yields that of the float pipeline.

    Raises:
        ConfigurationError: If it is that of the quantized pipeline.
    """
    of_float = folder / "float" if float_work is None else Path(float_work).resolve()
    if of_float == folder / "quantized":
        raise ConfigurationError(f"{of_float} holds the quantized pipeline's images; give another float_work")
    with (
        one_process(folder, share),
        nullcontext() if of_float in (folder, folder / "float") else one_process(of_float, share),
    ):
        yield of_float


def batch_of_folders(
    images: int, batch: int, work: str | Path | None, float_work: str | Path | None, overwrite: bool
) -> int:
    """Images per batch: as many as the folders hold in each if these are at most ``batch``, else as many as asked for.

    So a folder that was begun with few images, and then has small batches, can be continued.
    """
    if not overwrite:
        kept = [] if work is None else [Path(work) / "quantized"]
        kept += [Path(float_work)] if float_work is not None else [folder.with_name("float") for folder in kept]
        for held in map(batch_in, kept):
            if held is not None and held <= batch:
                return held
    return min(batch, images)


@contextmanager
def work_folder(work: str | Path | None) -> Iterator[Path]:
    """The folder that was given, or a temporary one."""
    if work is not None:
        yield Path(work).resolve()
        return
    with tempfile.TemporaryDirectory(prefix="fxquant-") as place:
        yield Path(place)
