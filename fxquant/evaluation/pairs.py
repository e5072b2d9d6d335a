"""Metrics of images against the float model's images of the same seeds: PSNR, SSIM and LPIPS."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import ConfigurationError, EvaluationError
from fxquant.evaluation.features import load_into
from fxquant.evaluation.weights import LPIPS, load_weights, require

SSIM_PIXELS = 11
"""Width of SSIM's window; smaller images have no SSIM."""

LPIPS_PIXELS = 31
"""Width of the smallest images that AlexNet takes."""


class Pairs:
    """Sums over pairs of images.

    Args:
        ssim: Whether to compute SSIM.
        lpips: The network of LPIPS (:func:`lpips_network`), or None.
        device: Where metrics are computed.
    """

    def __init__(self, ssim: bool = True, lpips: nn.Module | None = None, device: str = "cpu") -> None:
        self._ssim, self._lpips, self._device = ssim, lpips, torch.device(device)
        self.count = 0
        self._values = 0
        self._error = 0.0
        self._decibels: list[Tensor] = []
        self._sums = {"ssim": 0.0, "lpips": 0.0}

    @torch.no_grad()
    def add(self, images: Tensor, reference: Tensor) -> None:
        """Add pairs of uint8 images ``[n, 3, H, W]``.

        Raises:
            ConfigurationError: If the shapes differ.
        """
        if images.shape != reference.shape:
            raise ConfigurationError(
                f"images of shapes {tuple(images.shape)} and {tuple(reference.shape)} cannot be compared one by one"
            )
        made, truth = images.to(self._device), reference.to(self._device)
        squares = (made.double() - truth.double()).square().flatten(1)
        self._error += squares.sum().item()
        self._values += squares.numel()
        self._decibels.append(10 * (255**2 / squares.mean(dim=1)).log10().cpu())
        made, truth = made.float() / 255, truth.float() / 255
        if self._ssim:
            from torchmetrics.functional.image import structural_similarity_index_measure

            found: Any = structural_similarity_index_measure(made, truth, data_range=1.0, reduction="none")
            self._sums["ssim"] += found.double().sum().item()
        if self._lpips is not None:
            self._sums["lpips"] += self._lpips(made, truth, normalize=True).double().sum().item()
        self.count += len(images)

    def compute(self) -> dict[str, float]:
        """The metrics by name.

        ``psnr`` is that of all values together, in dB; ``psnr_per_image`` the mean over images of their own. Both are
        infinite for equal images, the second one if one pair is equal.

        Raises:
            EvaluationError: If another metric is not finite.
        """
        mean = self._error / self._values
        found = {
            "psnr": math.inf if mean == 0 else 10 * math.log10(255**2 / mean),
            "psnr_per_image": torch.cat(self._decibels).mean().item(),
        }
        if self._ssim:
            found["ssim"] = self._sums["ssim"] / self.count
        if self._lpips is not None:
            found["lpips"] = self._sums["lpips"] / self.count
        for name in self._sums.keys() & found.keys():
            if not math.isfinite(found[name]):
                raise EvaluationError(f"{name} is {found[name]}; look at the images, and at the weights of its network")
        return found


def lpips_network(path: Path, device: str = "cpu") -> nn.Module:
    """LPIPS with AlexNet, version 0.1 (arXiv 1801.03924).

    The linear layers are part of the package ``lpips``; the weights of AlexNet are not.

    Args:
        path: File of AlexNet's weights, with torchvision's names.
        device: Where it runs.

    Raises:
        MissingPackageError: If ``lpips`` or ``torchvision`` is missing or cannot be imported.
        CheckpointError: If the file does not hold these weights.
    """
    require("torchvision", "lpips")
    import lpips

    given = load_weights(path, LPIPS)
    with warnings.catch_warnings():  # lpips calls torchvision in an older way.
        warnings.simplefilter("ignore")
        network: Any = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    # The layers lie in slices there, each under the number that it has in torchvision's `features`.
    inside = {name: name.replace(name.split(".")[0], "features", 1) for name in network.net.state_dict()}
    load_into(lambda: network.net.load_state_dict({name: given[key] for name, key in inside.items()}), path)
    return network.to(device).eval().requires_grad_(False)
