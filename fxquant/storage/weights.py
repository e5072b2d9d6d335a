"""The files that hold the tensors of a checkpoint: one, or several shards with an index.

They have the names that diffusers and transformers give to the weights of a model, so that their ``from_pretrained``
finds them: ``diffusion_pytorch_model.safetensors`` or ``model.safetensors``, with a variant and the numbers of shards
in between. Checkpoints of earlier versions have one ``model.safetensors``, whatever the class.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxquant.disk.files import load_tensors, write_tensors
from fxquant.errors import CheckpointError, ConfigurationError
from fxquant.storage.agreement import Header, read_headers

SHARD_SIZE = "10GB"
"""The largest size of one file by default, as in diffusers."""

_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_)?model(?:\.(?P<variant>[\w-]+?))?(?:-\d{5}-of-\d{5})?\.safetensors", flags=re.A
)
_INDEX = re.compile(r"(?:diffusion_pytorch_)?model\.safetensors\.index(?:\.[\w-]+)?\.json", flags=re.A)
_VARIANT = re.compile(r"[\w-]{1,100}", flags=re.A)


def is_weights_file(name: str) -> bool:
    """Whether a file of a checkpoint with this name holds tensors, or is the index of such files."""
    return _WEIGHTS.fullmatch(name) is not None or _INDEX.fullmatch(name) is not None


def weight_names(files: Iterable[str], variant: str | None = None) -> list[str]:
    """The names of the files that hold the tensors, in order.

    Args:
        files: The names of all files of a checkpoint.
        variant: The variant that they must have, such as ``fp16``; None for whatever variant there is.

    Raises:
        CheckpointError: If there is none, or the checkpoint has another variant.
    """
    found = {name: match["variant"] for name in sorted(files) if (match := _WEIGHTS.fullmatch(name))}
    if not found:
        raise CheckpointError("the tensors are missing, diffusion_pytorch_model.safetensors; copy it again")
    held = next(iter(found.values()))
    if variant is not None and held != variant:
        there = "no variant" if held is None else f"the variant {held!r}"
        raise CheckpointError(
            f"there is no variant {variant!r}: the checkpoint holds {there}; read it "
            + ("without variant=" if held is None else f"with variant={held!r}")
        )
    return list(found)


def variant_of(files: Iterable[str]) -> str | None:
    """The variant of the files of a checkpoint, such as ``fp16``."""
    matches = (_WEIGHTS.fullmatch(name) for name in files)
    return next((match["variant"] for match in matches if match is not None), None)


def other_variants(folder: Path, variant: str | None) -> str:
    """Advice to give a variant that the weights of a pipeline's parts have; empty if they have no other."""
    names = [path.name for path in folder.glob("*/*.safetensors")] if folder.is_dir() else []
    found = sorted({held for name in names if (held := variant_of([name])) not in (None, variant)})
    told = " or ".join(f"variant={held!r} (--variant {held})" for held in found)
    return f". It holds files of another variant; give {told}" if found else ""


def write_weights(
    tensors: Mapping[str, Tensor],
    folder: Path,
    model_class: str,
    variant: str | None = None,
    max_shard_size: int | str = SHARD_SIZE,
) -> list[str]:
    """Write the tensors of a checkpoint.

    Args:
        tensors: The tensors by name.
        folder: The folder, which exists.
        model_class: Path of the model's class, such as ``diffusers:DiTTransformer2DModel``.
        variant: Part of the file names, such as ``fp16``.
        max_shard_size: The most bytes of one file, or a text such as ``"5GB"``. A larger tensor has a file of its own.

    Returns:
        The names of the written files: those of the tensors, then the index if there are several.

    Raises:
        ConfigurationError: If the variant cannot be part of a file name, or the size is not a size.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    _check_variant(variant)
    stem = "diffusion_pytorch_model" if model_class.startswith("diffusers:") else "model"
    told = "" if variant is None else f".{variant}"
    try:
        split = split_state_dict_into_shards_factory(
            dict(tensors),
            get_storage_size=lambda tensor: tensor.nbytes,
            filename_pattern=f"{stem}{told}{{suffix}}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise ConfigurationError(f"max_shard_size={max_shard_size!r} is not a size; write 5GB, for example") from error
    files = split.filename_to_tensors or {f"{stem}{told}.safetensors": []}  # from_pretrained looks for a file.
    for name, held in files.items():
        write_tensors({key: tensors[key] for key in held}, folder / name)
    written = list(files)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        written.append(f"{stem}.safetensors.index{told}.json")
        (folder / written[-1]).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return written


def _check_variant(variant: Any) -> None:
    if variant is not None and not (isinstance(variant, str) and _VARIANT.fullmatch(variant)):
        raise ConfigurationError(
            f"variant={variant!r} cannot be part of a file name; give letters and digits, such as 'fp16'"
        )


def headers_of(paths: Sequence[Path]) -> dict[str, Header]:
    """The dtypes and shapes of all tensors of a checkpoint by name.

    Raises:
        CheckpointError: If a file cannot be read, or two hold a tensor of the same name.
    """
    found: dict[str, Header] = {}
    for path in paths:
        headers = read_headers(path)
        twice = next(iter(found.keys() & headers.keys()), None)
        if twice is not None:
            raise CheckpointError(f"{path} holds tensor {twice!r}, and so does another file; copy the checkpoint again")
        found |= headers
    return found


def load_weights(paths: Sequence[Path], device: torch.device) -> dict[str, Tensor]:
    """All tensors of a checkpoint by name, on a device. The files are mapped and read in parts.

    Raises:
        CheckpointError: If a file cannot be read.
    """
    return {name: tensor for path in paths for name, tensor in load_tensors(path, device).items()}
