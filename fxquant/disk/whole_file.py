"""Files that are written completely or not at all, and that replace other files in one step."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fxquant.disk.exchange import force
from fxquant.disk.folders import SAVING, beside, parents_of
from fxquant.disk.refusals import writing
from fxquant.errors import WriteError

_OF_MODELS = frozenset(
    {"config.json", "model.safetensors", "model_index.json", "plan.json", "plan.safetensors"}
    | {"diffusion_pytorch_model.safetensors"}
)
"""Files that make up a model. They are written with their whole folder, and nothing else replaces them."""


@contextmanager
def whole_file(path: str | Path, *, forced: bool = True) -> Iterator[Path]:
    """Yield the path of a file to write; afterwards it becomes ``path`` and replaces what is there.

    If the block raises, the file that is there stays, and nothing else is left.

    Args:
        path: The final place; its folder is created.
        forced: Whether the file is forced to the disk before it takes its place. Without this, the file survives the
            end of the process, but may be damaged after a power failure.

    Raises:
        WriteError: If the file cannot be written, or a folder or a file of a model is in its place.
    """
    path = Path(path)
    with writing(path), parents_of(path):
        if path.is_dir():
            raise WriteError(f"{path} is a folder; choose another name for the file")
        if path.name in _OF_MODELS and path.exists():
            raise WriteError(f"{path} is a file of a model, which would be lost; choose another name for the file")
        unfinished = path.with_name(beside(path, SAVING))
        try:
            yield unfinished
            if forced:
                force(unfinished)
            os.replace(unfinished, path)
            with suppress(PermissionError):  # The folder may be writable but not readable.
                if forced:
                    force(path.parent)
        finally:
            unfinished.unlink(missing_ok=True)
