"""Folders of models with several entries, of which parts are quantized, such as VAEs.

``config.json`` is that of the model's class. Its entry ``quantization_config`` names the parts. The weights of the
float rest have the names that diffusers gives them, and each part is a checkpoint in a folder of its name.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxquant.capture.rebuilding import class_of, difference_of_tensors, is_made_from_config
from fxquant.capture.trace import Architecture
from fxquant.capture.whole import whole_of
from fxquant.disk.files import blaming, dtype_name, is_plain_file, refuse_to_replace
from fxquant.disk.folders import whole_folder
from fxquant.errors import CheckpointError, ConfigurationError
from fxquant.ir.tensors import weights_and_buffers
from fxquant.pipeline.backend import Backend
from fxquant.runtime.float_model import class_path
from fxquant.runtime.model import GraphModel
from fxquant.runtime.parts import guarded, quantized_parts, with_modules, with_parts
from fxquant.schemas.common import read_json
from fxquant.storage.aot.model import CONFIG_FILE
from fxquant.storage.checkpoint import is_checkpoint_file, load, save
from fxquant.storage.part_names import PARTS, parts_in
from fxquant.storage.pretrained import push, save_pretrained
from fxquant.storage.skeleton import QUANT_METHOD, QUANTIZATION
from fxquant.storage.weights import SHARD_SIZE, is_weights_file, variant_of, write_weights


def made_of_parts(model: nn.Module, parts: Mapping[str, GraphModel]) -> nn.Module:
    """An object of the class of a model, with quantized parts, that can be saved.

    Args:
        model: The float model. It does not change, and shares its float tensors with the result.
        parts: The quantized parts by name.

    Raises:
        ConfigurationError: If there is no part, or no layer of a part is quantized.
    """
    if not parts:
        raise ConfigurationError(
            f"calibrate called no part of this {type(model).__name__} that can be quantized; name the parts (parts=), "
            "and call them, or leave the model float"
        )
    for name, part in parts.items():
        if part.plan is None or not any(True for _ in part.plan.quantized()):
            raise ConfigurationError(
                f"no layer of the {name} of this {type(model).__name__} is quantized: the recipe leaves them float, or "
                "they compute their weights in each call, as torch.nn.utils.weight_norm does. Fuse the weights with "
                "torch.nn.utils.remove_weight_norm, or leave the model float"
            )
    return savable(with_parts(model, parts))


def savable(model: nn.Module) -> nn.Module:
    """Let a model save itself with its quantized parts, and refuse what the parts cannot do. Changes the model."""
    vars(model)["save_pretrained"] = functools.partial(save_pretrained, model)
    vars(model)["push_to_hub"] = functools.partial(push, model)
    return guarded(model)


def save_model(
    model: nn.Module,
    folder: str | Path,
    *,
    overwrite: bool = False,
    variant: str | None = None,
    max_shard_size: int | str = SHARD_SIZE,
) -> None:
    """Write a model with quantized parts to a folder, either completely or not at all.

    Args:
        model: What :func:`fxquant.compile_parts` returned.
        folder: The folder to write; it is created, with its parents.
        overwrite: Replace such a model that is already there. Nothing else is ever replaced.
        variant: Part of the file names of the weights, such as ``fp16``.
        max_shard_size: The most bytes of one file of weights, or a text such as ``"5GB"``.

    Raises:
        ConfigurationError: If no part of the model is quantized, or an option cannot be used.
        CheckpointError: If the folder exists and ``overwrite`` is not given, or holds other files; or if loading would
            build another part.
        WriteError: If the disk is full, the folder cannot be written, or another process wrote there in the meantime;
            existing files stay.
    """
    parts = quantized_parts(model)
    if not parts:
        raise ConfigurationError(
            f"no part of this {type(model).__name__} is quantized yet: its parts are quantized when they are first "
            "called. Decode something before you save it"
        )
    _check_rest(model, parts)
    with whole_folder(Path(folder).resolve(), lambda path: refuse_existing(path, overwrite)) as written:
        for name, part in parts.items():
            save(part, written / name, variant=variant, max_shard_size=max_shard_size)
        rest = {name: tensor for name, tensor in model.state_dict().items() if name.partition(".")[0] not in parts}
        write_weights(rest, written, class_path(model), variant, max_shard_size)
        (written / CONFIG_FILE).write_text(_config_text(model, parts), encoding="utf-8")


def _check_rest(model: nn.Module, parts: Mapping[str, GraphModel]) -> None:
    """Refuse to write a model from which modules were removed, or to which some were added: it could not be read."""
    whole = next(filter(None, (whole_of(part.architecture.skeleton) for part in parts.values())), None)
    if whole is None or not is_made_from_config(whole.model_class):
        return
    made = Architecture.from_config(whole.model_class, whole.config, None).skeleton
    original = with_modules(model, {name: part.architecture.skeleton for name, part in parts.items()})
    difference = difference_of_tensors(dict(weights_and_buffers(original)), dict(weights_and_buffers(made)))
    if difference is not None:
        raise CheckpointError(f"loading would not build this {type(model).__name__} again: {difference}. Undo that")


def _config_text(model: Any, parts: Mapping[str, GraphModel]) -> str:
    config = json.loads(model.to_json_string())
    config.pop("_name_or_path", None)
    first = next(iter(parts.values()))
    config[QUANTIZATION] = {
        "quant_method": QUANT_METHOD,
        "dtype": dtype_name(first.dtype),
        PARTS: list(parts),
        "version": version("fxquant"),
    }
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def refuse_existing(folder: Path, overwrite: bool) -> None:
    """Refuse to write a model with quantized parts over something that must stay.

    Raises:
        CheckpointError: If the path is a file, a folder that is not empty while ``overwrite`` is not given, or a folder
            that holds anything other than such a model.
    """
    if not overwrite or not folder.is_dir() or not any(folder.iterdir()):
        refuse_to_replace(folder, overwrite, lambda _: False, CONFIG_FILE)
        return
    names = parts_in(folder)
    other = next((path for path in folder.iterdir() if not is_of_model(path, names)), None)
    if not names or other is not None:
        raise CheckpointError(
            f"{folder} holds something other than a model with quantized parts"
            f"{f' ({other.name})' if names and other else ''}, which overwriting would delete; choose another folder"
        )


def is_of_model(path: Path, parts: Sequence[str]) -> bool:
    """Whether an entry of a folder belongs to a model with these quantized parts."""
    if path.name in parts:
        return not path.is_symlink() and path.is_dir() and all(map(is_checkpoint_file, path.iterdir()))
    return is_plain_file(path) and (path.name == CONFIG_FILE or is_weights_file(path.name))


def read_parts(
    model: nn.Module,
    folder: Path,
    names: Sequence[str],
    device: torch.device,
    backend: str | Backend | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Put the quantized parts of a folder into a model whose other weights are read already. Changes the model.

    Args:
        model: The model; its parts may have no values.
        folder: The folder.
        names: The names of the quantized parts.
        device: The device for all tensors.
        backend: A backend other than the ones that the parts were compiled for.
        dtype: A dtype other than the one that the parts have.

    Raises:
        CheckpointError: As for :func:`fxquant.load`, or if a part belongs to another class of model.
    """
    own = None if type(model).__module__.startswith("diffusers.") else type(model)
    read = {name: load(folder / name, backend=backend, device=device, model=own, dtype=dtype) for name in names}
    for name, part in read.items():
        wanted = f"{class_path(model)}/{name}"
        if part.plan is None or part.plan.model_class != wanted:
            held = None if part.plan is None else part.plan.model_class
            raise CheckpointError(f"{folder / name} holds a part of {held}, not {wanted}; copy the model again")
    for name in ("is_quantized", "quantization_method"):  # Set by diffusers, which would refuse dtypes by itself.
        vars(model).pop(name, None)
    for name, part in read.items():
        setattr(model, name, part)
    missing = [name for name, tensor in weights_and_buffers(model) if tensor.is_meta]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {missing[0]!r} and {len(missing) - 1} more tensors of a {type(model).__name__}; copy the "
            "model again"
        )
    return savable(model).to(device)


def load_model(
    folder: Path,
    *,
    device: torch.device,
    backend: str | Backend | None,
    model: Any,
    variant: str | None,
    dtype: torch.dtype | None,
) -> nn.Module:
    """Read a model with quantized parts; what :func:`fxquant.load` does for such a folder.

    Args:
        folder: What :func:`save_model` wrote.
        device: The device for all tensors.
        backend: A backend other than the ones that the parts were compiled for.
        model: The class of a model that is not from diffusers.
        variant: The variant that the files must have; by default the one that they have.
        dtype: The dtype that the model computes in; by default the one that it has.

    Raises:
        CheckpointError: If a file is missing or damaged, or belongs to another model.
        ConfigurationError: If ``model`` is an instance.
    """
    names = parts_in(folder)
    _, config = read_json(folder / CONFIG_FILE, "checkpoint")
    with blaming(folder / CONFIG_FILE):
        cls = class_of(f"diffusers:{config.get('_class_name')}") if model is None else model
    if not callable(getattr(cls, "from_pretrained", None)) or isinstance(cls, nn.Module):
        raise ConfigurationError(f"model={model!r} is not a class with from_pretrained; pass the class of the model")
    given = variant_of(path.name for path in folder.iterdir()) if variant is None else variant
    made = cls.from_pretrained(folder, variant=given, dtype=dtype, device_map=str(device))
    return made if backend is None else read_parts(made, folder, names, device, backend, dtype)
