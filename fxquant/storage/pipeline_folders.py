"""The folders of pipelines: what their index lists, and which files may be replaced."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from fxquant.disk.files import few, is_plain_file
from fxquant.errors import CheckpointError, ConfigurationError
from fxquant.planning.plan import PLAN_FILE
from fxquant.storage.aot.model import PACKAGE_FILE
from fxquant.storage.aot.package import is_package_file
from fxquant.storage.card import is_own_card
from fxquant.storage.checkpoint import is_checkpoint_file
from fxquant.storage.part_names import parts_in
from fxquant.storage.parts import is_of_model

INDEX_FILE = "model_index.json"


def parts_of(folder: Path) -> list[str]:
    """The names of the parts that the index of a pipeline lists.

    Raises:
        CheckpointError: If the index is missing or cannot be read.
    """
    index = read_index(folder)
    named = [name for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2 and entry[0]]
    return [name for name in named if name not in (".", "..") and Path(name).name == name]


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a pipeline.

    Raises:
        CheckpointError: If it is missing or cannot be read.
    """
    path = folder / INDEX_FILE
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; copy the pipeline again") from error
    if not isinstance(index, dict):
        raise CheckpointError(f"{path} is not a pipeline index: it is not a JSON object; copy the pipeline again")
    return index


def refuse_existing(folder: Path, overwrite: bool) -> None:
    """Refuse to write a pipeline over something that must stay.

    Raises:
        CheckpointError: If the path is a file, a folder that is not empty while ``overwrite`` is not given, or a folder
            that holds anything other than a quantized pipeline.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; choose another name for the folder")
    if not any(folder.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(f"{folder} exists; choose another folder or overwrite it (overwrite=True, --overwrite)")
    if not (folder / INDEX_FILE).is_file():
        raise CheckpointError(f"{folder} holds files other than a pipeline, which would be lost; choose another folder")
    names = parts_of(folder)
    others = sorted(_others(folder, names))
    if others:
        raise CheckpointError(
            f"{folder} holds more than a pipeline ({few(others)}), which overwriting would delete; choose another "
            "folder, or move them away"
        )
    marks = (folder / name / mark for name in names for mark in (PLAN_FILE, PACKAGE_FILE))
    if not any(mark.is_file() for mark in marks) and not any(_parts_in(folder / name) for name in names):
        raise CheckpointError(
            f"{folder} holds a pipeline without a quantized part: fxquant did not write it and does not replace it; "
            "choose another folder, or remove it yourself"
        )


def refuse_input(folder: Path, source: Path) -> None:
    """Refuse to replace the input folder, or a folder that contains it.

    Raises:
        ConfigurationError: If ``source``, or the target of a link in it, is ``folder`` or is inside of ``folder``.
    """
    if not source.exists():
        return
    folder = folder.resolve()
    for read in (source, *(source.iterdir() if source.is_dir() else ())):
        if read.resolve().is_relative_to(folder):
            raise ConfigurationError(
                f"{folder} is the input, or contains it ({read}), and would be replaced; choose another folder"
            )


_PARTS_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.jinja", "merges.txt", "vocab.txt")


def _others(folder: Path, parts: Sequence[str]) -> Iterator[str]:
    """The names of entries of a folder that do not belong to a pipeline of these parts."""
    for path in folder.iterdir():
        if path.name not in parts or path.is_symlink() or not path.is_dir():
            if not is_plain_file(path) or not (path.name == INDEX_FILE or is_own_card(path)):
                yield path.name
            continue
        held, inner = [*path.iterdir()], _parts_in(path)
        for entry in held:
            if inner and is_of_model(entry, inner):
                continue
            if not (is_plain_file(entry) and _is_of_part(entry, {other.name for other in held})):
                yield f"{path.name}/{entry.name}"


def _parts_in(folder: Path) -> list[str]:
    """The quantized parts of a model that is to be replaced; its config may be damaged, which replacing it mends."""
    try:
        return parts_in(folder)
    except CheckpointError:
        return []


def _is_of_part(path: Path, beside: Collection[str]) -> bool:
    """Whether a file belongs to a part that has these files."""
    name = path.name
    if PLAN_FILE in beside:
        return is_checkpoint_file(path)
    if PACKAGE_FILE in beside:
        return is_package_file(path)
    return not name.startswith(".") and any(fnmatch(name, pattern) for pattern in _PARTS_FILES)
