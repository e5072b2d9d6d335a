"""Feature extractors: the Inception network of the field, or any torch module."""

from __future__ import annotations

import importlib
import io
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fxquant.disk.files import digest
from fxquant.errors import CheckpointError, ConfigurationError, EvaluationError, QualityWarning
from fxquant.evaluation.keys import described, digest_of_state
from fxquant.evaluation.weights import INCEPTION, load_weights, require

Input = Literal["unit", "uint8"]
"""What an extractor is called on: float32 in [0, 1], or uint8 in 0 to 255."""

SPATIAL_CHANNELS = 7
"""Channels of Inception's layer ``mixed_6/conv`` whose positions are the features of sFID, as in ADM's evaluation."""

_PUBLISHED = "6726825d"  # Beginning of the SHA-256 of Inception's weights, which is part of the name of the file.


@dataclass(frozen=True)
class Features:
    """What an extractor finds in some images.

    Attributes:
        pooled: float32 ``[n, d]``, for the Fréchet distance, precision and recall.
        spatial: float32 ``[n, s]``, for sFID; None if the extractor has none.
        logits: float32 ``[n, classes]``, class scores before the softmax, for the inception score; or None.
    """

    pooled: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that there are, by name."""
        found = {"pooled": self.pooled, "spatial": self.spatial, "logits": self.logits}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


class Extractor:
    """A network that is called on images.

    Args:
        module: Called on ``[n, 3, H, W]``. It returns features ``[n, d]``, or a mapping with ``features`` and
            optionally ``spatial`` ``[n, s]`` and ``logits`` ``[n, classes]``.
        takes: ``unit`` to call it on float32 in [0, 1], ``uint8`` for bytes.
        name: What results call it; the name of its class if None.
        device: Where it runs.

    Raises:
        ConfigurationError: If the module cannot be called, or ``takes`` is something else.
    """

    def __init__(self, module: Any, takes: Input = "unit", name: str | None = None, device: str = "cpu") -> None:
        if takes not in ("unit", "uint8"):
            raise ConfigurationError(f"a feature extractor takes 'unit' or 'uint8' images, not {takes!r}")
        if not callable(module) or isinstance(module, type):
            raise ConfigurationError(f"a feature extractor should be a module or function, not {module!r}")
        self.takes, self.device = takes, torch.device(device)
        self.name = name or type(module).__name__
        self._module = module
        if isinstance(module, nn.Module):
            self._module = module.to(self.device).eval()
        self._key: str | None = None

    @property
    def key(self) -> str:
        """16 characters that are equal for equal extractors: a digest of the input, the weights, options and code."""
        if self._key is None:
            self._key = digest_of_state(self._module, f"{self.takes} {described(self._module)}")[:16]
        return self._key

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """The features of uint8 images ``[n, 3, H, W]``, on the CPU.

        Raises:
            EvaluationError: If the module fails or returns something else.
        """
        given = images.to(self.device)
        given = given.float() / 255 if self.takes == "unit" else given
        try:
            found = self._module(given)
        except Exception as error:
            raise EvaluationError(
                f"the feature extractor {self.name} failed on {self.takes} images {tuple(images.shape)}: "
                f"{type(error).__name__}: {error}"
            ) from error
        if not isinstance(found, Mapping):
            found = {"features": found}
        unknown = sorted({str(name) for name in found} - {"features", "spatial", "logits"})
        if unknown or found.get("features") is None:
            raise EvaluationError(
                f"the feature extractor {self.name} returned {sorted(map(str, found))}; it should return a tensor, "
                "or a mapping with 'features', and optionally 'spatial' and 'logits'"
            )
        checked = {name: self._checked(tensor, len(images)) for name, tensor in found.items() if tensor is not None}
        return Features(checked["features"], checked.get("spatial"), checked.get("logits"))

    def _checked(self, tensor: Any, count: int) -> Tensor:
        if not isinstance(tensor, Tensor) or tensor.ndim != 2 or len(tensor) != count:
            shape = f"shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
            raise EvaluationError(
                f"the feature extractor {self.name} returned {shape} for {count} images; [{count}, d] is needed, so "
                "pool or flatten the rest"
            )
        if tensor.is_complex() or not tensor.shape[1]:
            raise EvaluationError(
                f"the feature extractor {self.name} returned {tensor.dtype} of shape {tuple(tensor.shape)}; real "
                "numbers are needed, at least one per image"
            )
        try:
            found = tensor.detach().to(torch.float32).cpu().contiguous()
        except Exception as error:  # Sparse tensors, those without data, and others raise different errors.
            raise EvaluationError(
                f"the feature extractor {self.name} returned a tensor that cannot be read: {error}"
            ) from error
        if not found.isfinite().all():
            raise EvaluationError(
                "the features hold NaN or infinity; look at the images, and at the weights of the feature extractor "
                f"{self.name}"
            )
        return found


def named_extractor(text: str, takes: Input = "unit", device: str = "cpu") -> Extractor:
    """The extractor that ``module:attribute`` names: a module, or a function without arguments that returns one.

    The current folder is searched too.

    Raises:
        ConfigurationError: If there is no such attribute, or it is neither.
    """
    place, _, attribute = text.partition(":")
    if not place or not attribute:
        raise ConfigurationError(f"--features {text}: write it as module:attribute, such as my_networks:features")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(place)
        for part in attribute.split("."):
            found = getattr(found, part)
        if not isinstance(found, nn.Module):
            found = found()
    except Exception as error:  # Whatever the user's code raises.
        raise ConfigurationError(f"--features {text} cannot be used: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    if not callable(found):
        raise ConfigurationError(f"--features {text} should be a torch module or a function that returns one")
    return Extractor(found, takes, text, device)


def inception(path: Path, device: str = "cpu") -> Extractor:
    """The Inception network of FID (the TensorFlow graph of 2015-12-05), with its spatial features.

    Args:
        path: File of its weights.
        device: Where it runs.

    Raises:
        MissingPackageError: If ``torch-fidelity`` or ``torchvision`` is missing or cannot be imported.
        CheckpointError: If the file does not hold these weights.
    """
    require("torchvision", "torch_fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    if not digest(path).startswith(_PUBLISHED):
        warnings.warn(
            f"{path} is not the published file of weights, so its figures are not comparable with those of others",
            QualityWarning,
            stacklevel=2,
        )
    buffer = io.BytesIO()
    torch.save(load_weights(path, INCEPTION), buffer)  # torch-fidelity would read the file itself, code included.
    buffer.seek(0)
    network = load_into(
        lambda: FeatureExtractorInceptionV3(
            "inception-v3", ["2048", "logits_unbiased"], feature_extractor_weights_path=buffer
        ),
        path,
    )
    return Extractor(InceptionFeatures(network), "uint8", f"Inception ({path.name})", device)


def load_into(make: Callable[[], Any], path: Path) -> Any:
    """A network with weights from a file; says which file it was if they do not fit."""
    try:
        return make()
    except (RuntimeError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path} does not hold the weights of this network: {reason}") from error


class InceptionFeatures(nn.Module):
    """The Inception network, with the features of sFID beside its own.

    sFID's are the first seven channels of the layer ``mixed_6/conv``: positions first, as TensorFlow has them, because
    the reference statistics of ADM are in this order.

    Args:
        network: torch-fidelity's, which returns pooled features and class scores without the bias.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._seen: list[Tensor] = []
        branch: Any = network.get_submodule("Mixed_6d.branch1x1")
        branch.register_forward_hook(lambda _, __, output: self._seen.append(output[:, :SPATIAL_CHANNELS]))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """``features`` [n, 2048], ``spatial`` [n, 2023] and ``logits`` [n, 1008] of uint8 images [n, 3, H, W]."""
        self._seen.clear()
        pooled, logits = self.network(images)
        spatial = self._seen.pop().permute(0, 2, 3, 1).flatten(1)
        return {"features": pooled, "spatial": spatial, "logits": logits}
