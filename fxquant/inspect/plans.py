"""Finds the plan that an inspection is about: of a quantized model, of a checkpoint, or of a part of a pipeline."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from fxquant.disk.folders import no_folder
from fxquant.errors import CheckpointError, ConfigurationError
from fxquant.planning.plan import PLAN_FILE, Plan
from fxquant.runtime.parts import quantized_parts
from fxquant.runtime.wrappers import unwrapped


def plan_of(model: nn.Module | Plan | str | Path) -> Plan:
    """The plan of a quantized model or of a checkpoint, or the plan itself.

    Raises:
        ConfigurationError: If it is something else.
        CheckpointError: If the folder holds no checkpoint, or a damaged one.
    """
    if isinstance(model, Plan):
        return model
    if isinstance(model, (str, Path)):
        return Plan.load(checkpoint_folder(model))
    parts = quantized_parts(model)
    if parts:
        raise ConfigurationError(
            f"report is about one graph, and each part of this {type(model).__name__} is one; give a part: "
            f"{' or '.join(f'model.{name}' for name in parts)}"
        )
    plan = getattr(unwrapped(model), "plan", None)
    if not isinstance(plan, Plan):
        raise ConfigurationError(
            f"report takes a quantized model, a plan or the folder of a checkpoint, not a {type(model).__name__}; "
            "make a quantized model with fxquant.compile"
        )
    return plan


def checkpoint_folder(folder: str | Path) -> Path:
    """The folder itself, or the part of a pipeline's folder that holds the checkpoint.

    Raises:
        CheckpointError: If the folder holds no checkpoint, or more than one.
    """
    from fxquant.storage.aot.model import PACKAGE_FILE
    from fxquant.storage.part_names import parts_in
    from fxquant.storage.pipeline_folders import INDEX_FILE, parts_of

    folder = Path(folder)
    if not folder.is_dir():
        raise no_folder(folder)
    if (folder / PLAN_FILE).is_file():
        return folder
    named = parts_of(folder) if (folder / INDEX_FILE).is_file() else [path.name for path in folder.glob("[!.]*")]
    places = [folder / name for name in sorted(named)]
    found = [place for one in places for place in (one, *(one / inner for inner in parts_in(one)))]
    found = [place for place in found if (place / PLAN_FILE).is_file()]
    if not found:
        if any((place / PACKAGE_FILE).is_file() for place in (folder, *(folder / name for name in named))):
            raise CheckpointError(
                f"{folder} holds a package, compiled ahead of time, which has no plan; give the folder that it was "
                "exported from"
            )
        if (folder / INDEX_FILE).is_file():
            raise CheckpointError(
                f"{folder} holds no {PLAN_FILE}: no part of this pipeline is quantized; see fxquant quantize"
            )
        raise CheckpointError(f"{folder} holds no {PLAN_FILE}: fxquant did not write it, or files are missing")
    if len(found) > 1:
        raise CheckpointError(f"{folder} holds several quantized models; name one: {', '.join(map(str, found))}")
    return found[0]
