"""Folders of images in numbered batches, which an interrupted evaluation continues.

A folder holds ``settings.json``, one file ``images-000000.safetensors`` for each batch, and the features that
extractors found in them. Each file is written completely or not at all. Several processes may fill one folder, each
with batches of its own.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from fxquant.disk.files import load_tensors
from fxquant.disk.finished_work import locked
from fxquant.disk.folders import SAVING, check_writable
from fxquant.disk.locks import Lock
from fxquant.disk.refusals import writing
from fxquant.disk.whole_file import whole_file
from fxquant.errors import CheckpointError, EvaluationError, FolderInUseError
from fxquant.evaluation.features import Extractor, Features
from fxquant.text import printable

SETTINGS = "settings.json"
_OURS = re.compile(r"images-\d{6,}\.safetensors|features-[0-9a-f]{16}-\d{6,}\.safetensors")
_UNFINISHED = re.compile(
    rf"\.(settings\.json|(images|features-[0-9a-f]{{16}})-(?P<number>\d{{6,}})\.safetensors)\.{SAVING}-"
)
_CPU = torch.device("cpu")
_MOST = 10  # Settings that a message names.
_POLL = 1.0  # Seconds between looks at batches that other processes make.


class Store:
    """The images of one pipeline.

    Args:
        folder: Where they are; made if it is missing.
        settings: What the images depend on. A folder with other settings is refused.
        overwrite: Whether images of other settings are removed instead.

    Raises:
        EvaluationError: If the folder holds images of other settings; names the differences.
        CheckpointError: If its settings cannot be read.
        WriteError: If it cannot be written.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], overwrite: bool = False) -> None:
        self.folder = folder
        self.restarted = False
        self._shape: torch.Size | None = None  # Of the first batch that was read.
        check_writable(folder)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        path = folder / SETTINGS
        wanted = json.loads(json.dumps(dict(settings)))
        if path.exists():
            held = _read_settings(path, {} if overwrite else None)
            if held == wanted:
                return
            if not overwrite:
                if _differing(held, wanted) == ["batch"]:
                    raise EvaluationError(
                        f"{folder} holds batches of {held.get('batch')} images, not {wanted['batch']}; give --batch "
                        f"{held.get('batch')} (batch={held.get('batch')}) to continue, another folder, or --overwrite "
                        "(overwrite=True) to make them anew"
                    )
                raise EvaluationError(
                    f"{folder} holds images of other settings ({_differences(held, wanted)}); give another folder, or "
                    "--overwrite (overwrite=True) to make them anew"
                )
            self._remove_images()
            self.restarted = True
        elif any(_OURS.fullmatch(file.name) for file in folder.iterdir()):
            if not overwrite:
                raise CheckpointError(
                    f"{path} is missing, so it is unknown what made the images; give another folder, or --overwrite "
                    "(overwrite=True) to make them anew"
                )
            self._remove_images()
            self.restarted = True
        with whole_file(path) as scratch:
            scratch.write_text(json.dumps(wanted, indent=1) + "\n")

    def _remove_images(self) -> None:
        with writing(self.folder):
            for file in list(self.folder.iterdir()):
                if _OURS.fullmatch(file.name):
                    file.unlink()
            (self.folder / SETTINGS).unlink(missing_ok=True)  # Last: a killed process leaves images that it names.

    def tidy(self, shard: tuple[int, int]) -> None:
        """Remove what a killed process left of files of this share, which no other process writes."""
        with writing(self.folder):
            for file in list(self.folder.iterdir()):
                found = _UNFINISHED.match(file.name)
                if found is None:
                    continue
                number = found["number"]  # All processes write the settings.
                if shard[1] == 1 if number is None else int(number) % shard[1] == shard[0]:
                    file.unlink(missing_ok=True)

    def _images(self, number: int) -> Path:
        return self.folder / f"images-{number:06d}.safetensors"

    def has(self, number: int) -> bool:
        """Whether a batch was made."""
        return self._images(number).exists()

    def write(self, number: int, images: Tensor) -> None:
        """Keep a batch, uint8 ``[n, 3, H, W]``."""
        _write({"images": images}, self._images(number))

    def read(self, number: int) -> Tensor:
        """The images of a batch, uint8 ``[n, 3, H, W]``; all batches have one shape.

        Raises:
            CheckpointError: If it cannot be read.
        """
        path = self._images(number)
        images = _read(path).get("images")
        if images is None or images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise CheckpointError(f"{path} does not hold images; remove it, and the same command makes it again")
        if self._shape not in (None, images.shape):
            raise CheckpointError(
                f"{path} holds images of shape {tuple(images.shape)} where other batches have "
                f"{tuple(self._shape or ())}; remove it, and the same command makes it again"
            )
        self._shape = images.shape
        return images

    def features(self, number: int, extractor: Extractor) -> Features:
        """The features of a batch, from its file if they were computed before.

        Raises:
            CheckpointError: If a file cannot be read.
            EvaluationError: If the extractor fails.
        """
        path = self.folder / f"features-{extractor.key}-{number:06d}.safetensors"
        if path.exists():
            return _checked(_read(path), len(self.read(number)) if self._shape is None else self._shape[0], path)
        found = extractor(self.read(number))
        _write(found.tensors(), path)
        return found

    def wait_for(self, numbers: range) -> None:
        """Wait until other processes have made these batches."""
        for number in numbers:
            while not self.has(number):
                time.sleep(_POLL)


def batch_in(folder: Path) -> int | None:
    """Images per batch of a folder; None if it holds none yet, or its settings cannot be read."""
    try:
        held = _read_settings(folder / SETTINGS).get("batch")
    except CheckpointError:  # If the file is there but damaged, Store refuses the folder.
        return None
    return held if isinstance(held, int) and held > 0 else None


@contextmanager
def one_process(folder: Path, shard: tuple[int, int]) -> Iterator[None]:
    """Keep other processes with the same share of the work away, and those that divide it in another way.

    Raises:
        EvaluationError: If there is one.
    """
    place = folder / f".shard-{shard[0]}-of-{shard[1]}"
    check_writable(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = locked(place)
    except FolderInUseError:
        raise EvaluationError(f"another process evaluates in {folder}; wait for it, or give another folder") from None
    for other in folder.glob(".shard-*-of-*"):
        if not other.name.endswith(f"-of-{shard[1]}") and Lock.of(other) is None and other.is_dir():
            made = other.name.removeprefix(".shard-").replace("-of-", "/")
            raise EvaluationError(
                f"another process makes share {made} in {folder}; wait for it, or give another folder"
            )
    yield
    del lock


def _write(tensors: Mapping[str, Tensor], path: Path) -> None:
    # As bytes: safetensors would write a file under a random name first, which a killed process leaves behind. It
    # refuses tensors that share memory, such as features that are the class scores too, so all are copied.
    data = save({name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()})
    with whole_file(path) as scratch:
        scratch.write_bytes(data)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_tensors(path, _CPU)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is damaged; remove it, and the same command makes it again") from error


def _checked(found: Mapping[str, Tensor], count: int, path: Path) -> Features:
    """The features in a file, which belong to so many images."""
    good = found.keys() <= {"pooled", "spatial", "logits"} and "pooled" in found
    for tensor in found.values():
        good = good and tensor.dtype == torch.float32 and tensor.ndim == 2 and len(tensor) == count
        good = good and bool(tensor.isfinite().all())
    if not good:
        raise CheckpointError(f"{path} does not hold the features of {count} images; remove it, and repeat the command")
    return Features(**found)


def _read_settings(path: Path, instead: dict[str, Any] | None = None) -> dict[str, Any]:
    """The settings in a file, or ``instead`` if they cannot be read and this is given."""
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError("it does not hold settings")
    except (OSError, ValueError, RecursionError) as error:
        if instead is not None:
            return instead
        raise CheckpointError(
            f"{path} cannot be read: {error}; give another folder, or --overwrite (overwrite=True) to make the images "
            "anew"
        ) from error
    return found


def _differing(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    return [name for name in {**held, **wanted} if held.get(name) != wanted.get(name)]


def _differences(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    names = _differing(held, wanted)
    shown = [
        f"another {_shown(name)}"
        if name in ("model", "prompts")
        else f"{_shown(name)} {_shown(held.get(name))}, not {_shown(wanted.get(name))}"
        for name in names[:_MOST]
    ]
    return ", ".join(shown) + (f" and {len(names) - _MOST} more" if len(names) > _MOST else "")


def _shown(value: Any) -> str:
    return printable(str(value), 60).replace("\n", " ")
