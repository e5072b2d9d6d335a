"""Weights of the metrics' networks: files that the user has. Nothing is downloaded."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxquant.errors import CheckpointError, MetricWeightsError, MissingPackageError


@dataclass(frozen=True)
class Weights:
    """The weights that a metric needs.

    Attributes:
        option: Name of the option of :func:`fxquant.evaluate` and, with dashes, of the command.
        variable: Environment variable that may name the file instead.
        what: What the weights are, in words.
        where: Where to get them.
        folder: Whether they are a folder and not a file.
    """

    option: str
    variable: str
    what: str
    where: str
    folder: bool = False

    def missing(self) -> str:
        """Why a metric does not run without these weights, and what to do; follows its name in a sentence."""
        return (
            f"needs {self.what}: {self.where}. Name the {'folder' if self.folder else 'file'} with "
            f"--{self.option} or {self.variable}"
        )


INCEPTION = Weights(
    "inception",
    "FXQUANT_INCEPTION",
    "the weights of the Inception network",
    "pt_inception-2015-12-05-6726825d.pth from the releases of mseitzer/pytorch-fid, or the equal "
    "weights-inception-2015-12-05-6726825d.pth from those of toshas/torch-fidelity",
)
LPIPS = Weights(
    "lpips",
    "FXQUANT_LPIPS",
    "the weights of AlexNet",
    "alexnet-owt-7be5be79.pth, which torchvision.models.alexnet downloads",
)
CLIP = Weights(
    "clip",
    "FXQUANT_CLIP",
    "a CLIP model",
    "the folder of openai/clip-vit-base-patch16 from the Hugging Face Hub",
    folder=True,
)


def find_weights(weights: Weights, given: str | Path | None) -> Path | None:
    """The path that was given, or that the environment variable names; None without either.

    Raises:
        MetricWeightsError: If nothing is there.
    """
    named = given if given is not None else os.environ.get(weights.variable) or None
    if named is None:
        return None
    path = Path(named).expanduser()
    if not (path.is_dir() if weights.folder else path.is_file()):
        by = f"--{weights.option}" if given is not None else weights.variable
        kind = "folder" if weights.folder else "file"
        raise MetricWeightsError(f"{by} {path} is not a {kind}; it should be {weights.what}: {weights.where}")
    return path


def load_weights(path: Path, weights: Weights) -> dict[str, Tensor]:
    """The tensors of a file of weights; code in it does not run.

    Raises:
        CheckpointError: If it cannot be read, or holds something else.
    """
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # A damaged file raises nearly anything.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} cannot be read: {reason}; it should hold {weights.what}: {weights.where}"
        ) from error
    if not isinstance(found, Mapping) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise CheckpointError(f"{path} does not hold {weights.what}; get {weights.where}")
    check_finite(path, weights, found)
    return dict(found)


def check_finite(path: Path, weights: Weights, tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights with NaN or infinity, whose figures would be NaN.

    Raises:
        CheckpointError: Names the first one.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError(f"{path}: {name} holds NaN or infinity; get {weights.where}")


def require(*packages: str) -> None:
    """Import the packages of a metric.

    Raises:
        MissingPackageError: Names the first that is missing or cannot be imported, and says how to install it.
    """
    for name in packages:
        try:
            importlib.import_module(name)
        except Exception as error:  # A torchvision of another build than torch raises RuntimeError.
            shown = name.replace("_", "-")
            if isinstance(error, ModuleNotFoundError) and error.name == name:
                raise MissingPackageError(f"{shown} is not installed: pip install 'fxquant[evaluation]'") from error
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise MissingPackageError(
                f"{shown} cannot be imported: {reason}. torchvision must be of the same build as torch; on a machine "
                "without a GPU install its CPU build"
            ) from error
