"""Pickles of quantized models: a pickle holds a checkpoint, so what a checkpoint cannot hold cannot be pickled."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.capture.rebuilding import is_rebuilt
from fxquant.capture.whole import own_class
from fxquant.errors import CheckpointError
from fxquant.pipeline.backend import Backend
from fxquant.runtime.model import GraphModel
from fxquant.storage.checkpoint import load, save


def reduced(model: GraphModel) -> tuple[Callable[..., GraphModel], tuple[Any, ...]]:
    """What pickle stores of a quantized model: the function that makes it again, and the arguments of that function.

    Graphs of calls that calibration did not make are left out, as in a checkpoint. They are captured again when needed.

    Raises:
        CheckpointError: If the model's class has no ``from_config``, or its class and config do not give the model
            that was compiled.
    """
    cls = own_class(model.architecture.skeleton)
    if not is_rebuilt(model.architecture.skeleton):
        raise CheckpointError(
            f"this model cannot be pickled: a pickle holds a checkpoint, and its class {cls.__name__} has no "
            "from_config to build the model from it. Write it with fxquant.save(model, folder) and read it with "
            "fxquant.load(folder, model=...)"
        )
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "model"
        try:
            save(model, written)
        except CheckpointError as error:
            raise CheckpointError(
                f"this model cannot be pickled, because a pickle holds a checkpoint: {error}"
            ) from error
        files = {path.name: path.read_bytes() for path in written.iterdir()}
    # An empty tensor, because torch.load moves it to its map_location.
    place = torch.empty(0, device=model.runs_on)
    return restored, (files, model.backend, place, None if cls.__module__.startswith("diffusers.") else cls)


def restored(files: Mapping[str, bytes], backend: Backend, place: Tensor, cls: type[nn.Module] | None) -> GraphModel:
    """Make a model again from what :func:`reduced` returned.

    Args:
        files: The files of a checkpoint by name.
        backend: The backend, with its options.
        place: An empty tensor on the device of the model.
        cls: Its class, if it is not from diffusers.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        return load(folder, backend=backend, device=place.device, model=cls)
