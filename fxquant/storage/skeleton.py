"""A checkpoint without its weights: the plan, and the architecture that its class and config describe.

Loading builds on this, and so does what shows how a graph was rewritten, which needs no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxquant.capture.feature_caches import functional
from fxquant.capture.rebuilding import LIBRARIES, class_of, is_made_from_config
from fxquant.capture.state import cast
from fxquant.capture.trace import Architecture
from fxquant.capture.whole import split_class
from fxquant.disk.files import blaming, digest_of, dtype_of_name, is_text_of
from fxquant.disk.folders import mention_leftovers, no_folder
from fxquant.errors import CheckpointError, ConfigurationError
from fxquant.planning.attribution import kept_attribution
from fxquant.planning.plan import FORMAT, PLAN_FILE, VECTORS_FILE, Plan, read_vectors
from fxquant.runtime.float_model import check_model
from fxquant.schemas.common import check, read_json
from fxquant.schemas.config import Config
from fxquant.schemas.plan import CheckpointFile
from fxquant.storage.agreement import Header, bounded, check_config, check_skeleton
from fxquant.storage.aot.model import CONFIG_FILE, PACKAGE_FILE
from fxquant.storage.weights import headers_of, weight_names
from fxquant.text import printable

QUANT_METHOD = "fxquant"
"""By this name diffusers finds what reads the tensors of a checkpoint."""
QUANTIZATION = "quantization_config"
"""The entry of ``config.json`` that says so. It is not an argument of the model's class."""


@dataclass(frozen=True)
class Description:
    """What a checkpoint says about its model.

    Attributes:
        folder: The folder.
        plan: The plan.
        dtype: Dtype of the float model.
        dtypes: Dtypes of tensors that differ from it, by name.
        headers: Shape and dtype of each stored tensor, by name.
        needs_model: Why the float model is needed to build the architecture, or None if its class and config suffice.
    """

    folder: Path
    plan: Plan
    dtype: torch.dtype
    dtypes: Mapping[str, torch.dtype]
    headers: Mapping[str, Header]
    needs_model: str | None

    def build(self, model: nn.Module | type[nn.Module] | None) -> Architecture:
        """The architecture, from its class and config, or from an instance.

        Args:
            model: As for :func:`fxquant.load`.

        Raises:
            CheckpointError: If the checkpoint needs an instance, belongs to another model, or its class is not known.
            ConfigurationError: If ``model`` is neither a class with ``from_config`` nor a model in evaluation mode.
        """
        if not isinstance(model, nn.Module) and self.needs_model is not None:
            raise CheckpointError(
                f"{self.folder} is read with the float model, made as it was for fxquant.compile: "
                f"fxquant.load(folder, model=...). Its class and config alone do not give it: "
                f"{printable(self.needs_model, 2000)}"
            )
        architecture = _architecture(self.plan, model, self.folder, self.headers)
        cast(architecture.skeleton, self.dtype, self.dtypes)
        return architecture


def description_of(folder: Path, data: Mapping[str, Any]) -> Description:
    """Read everything but the tensors.

    Args:
        folder: The folder of the checkpoint.
        data: What :func:`read_plan` returned.

    Raises:
        CheckpointError: If a file is missing or damaged.
    """
    with blaming(folder / PLAN_FILE):
        check(CheckpointFile, data, "the plan")
        plan = Plan.from_json(data, read_vectors(folder / VECTORS_FILE))
        plan.check()
        plan.attribution = kept_attribution(folder, plan.fingerprint())
        dtype = dtype_of_name(data["dtype"])
        dtypes = {name: dtype_of_name(text) for name, text in data["dtypes"].items()}
        headers = headers_of([folder / name for name in weight_names(data["files"])])
        return Description(folder, plan, dtype, dtypes, headers, data.get("needs_model"))


def read_plan(folder: Path) -> dict[str, Any]:
    """What ``plan.json`` holds.

    Raises:
        CheckpointError: If the folder holds no checkpoint, or the file is damaged or was edited.
    """
    path = folder / PLAN_FILE
    if not folder.is_dir():
        raise no_folder(folder)
    mention_leftovers(folder)
    if (folder / PACKAGE_FILE).is_file():
        raise CheckpointError(f"{folder} holds a model compiled ahead of time; fxquant.load_package reads it")
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: {folder} is not an fxquant checkpoint, or not all of it was copied")
    text, data = read_json(path, "checkpoint")
    if not isinstance(data, dict) or "format" not in data:
        raise CheckpointError(f"{path} is not an fxquant plan")
    # The text is compared too, because some damage does not change the parsed values.
    if data["format"] == FORMAT and (data.get("digest") != digest_of(data) or not is_text_of(text, data)):
        raise CheckpointError(
            f"{path} does not match its digest: it is damaged or was edited. Copy the checkpoint again; to change a "
            "plan, load it with fxquant.Plan.load, edit it and compile the float model with plan="
        )
    return data


def _architecture(plan: Plan, model: Any, folder: Path, headers: Mapping[str, Header]) -> Architecture:
    _, _, part = split_class(plan.model_class)
    if isinstance(model, nn.Module):
        model = functional(getattr(model, part, model)) if part else model  # The whole model, or the part itself.
        check_model(model)
        architecture = Architecture.of(model, plan.timestep)
        try:
            check_skeleton(architecture.skeleton, plan)
        except CheckpointError as error:
            raise CheckpointError(f"{folder} belongs to another model than model=: {error}") from None
        return architecture
    if model is None:
        model = _class_of(plan, folder)
    elif not is_made_from_config(model):
        raise ConfigurationError(f"model={model!r} is neither a class with from_config nor a model; pass one of them")
    _, config = read_json(folder / CONFIG_FILE, "checkpoint")
    with blaming(folder / CONFIG_FILE):
        check(Config, config, "the config")
        config.pop(QUANTIZATION, None)
        check_config(config, headers)
        with bounded(headers, plan.layers.values()):
            architecture = Architecture.from_config(model, config, plan.timestep, part)
        check_skeleton(architecture.skeleton, plan)
        return architecture


def _class_of(plan: Plan, folder: Path) -> Any:
    with blaming(folder / PLAN_FILE):
        module, name, _ = split_class(plan.model_class)
        if module not in LIBRARIES:  # Importing a module that a file names could run untrusted code.
            raise CheckpointError(
                f"{folder} holds a {name} from {module}, which is not in diffusers or transformers; pass its class or "
                "an instance in Python: fxquant.load(folder, model=...), and likewise fxquant.explain, fxquant.diff "
                "and fxquant.rewrite_history; fxquant report and fxquant plot need no model"
            )
        return class_of(plan.model_class)
