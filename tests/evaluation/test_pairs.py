"""PSNR, SSIM and LPIPS of pairs of images."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d

from fxquant.errors import CheckpointError, ConfigurationError, EvaluationError
from fxquant.evaluation.pairs import Pairs, lpips_network

GENERATOR = torch.Generator().manual_seed(0)
TRUTH = torch.randint(0, 256, (7, 3, 64, 64), dtype=torch.uint8, generator=GENERATOR)
NOISE = torch.randint(-40, 41, TRUTH.shape, generator=GENERATOR) * torch.arange(1, 8).view(7, 1, 1, 1) // 7
MADE = (TRUTH.int() + NOISE).clamp(0, 255).byte()


def figures(made: torch.Tensor, truth: torch.Tensor, **options: Any) -> dict[str, float]:
    pairs = Pairs(**options)
    for number in range(0, len(made), 3):
        pairs.add(made[number : number + 3], truth[number : number + 3])
    return pairs.compute()


def test_psnr() -> None:
    found = figures(MADE, TRUTH, ssim=False)
    errors = (MADE.double() - TRUTH.double()).square().mean((1, 2, 3)).numpy()
    assert found["psnr"] == pytest.approx(10 * math.log10(255**2 / errors.mean()), rel=1e-9)
    assert found["psnr_per_image"] == pytest.approx(np.mean(10 * np.log10(255**2 / errors)), rel=1e-9)
    from torchmetrics.functional.image import peak_signal_noise_ratio

    library = peak_signal_noise_ratio(MADE.double(), TRUTH.double(), data_range=255.0)
    assert found["psnr"] == pytest.approx(library.item(), rel=1e-6)


def test_ssim_equals_its_definition() -> None:
    """Gaussian windows of 11 pixels and deviation 1.5 around every pixel, mirrored at borders as torchmetrics does."""
    window = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window /= window.sum()

    def mean(x: np.ndarray) -> np.ndarray:
        for axis in (2, 3):
            x = correlate1d(x, window, axis=axis, mode="mirror")
        return x

    a, b = MADE.double().numpy() / 255, TRUTH.double().numpy() / 255
    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    expected = (2 * ma * mb + 0.01**2) * (2 * cov + 0.03**2) / ((ma**2 + mb**2 + 0.01**2) * (va + vb + 0.03**2))
    assert figures(MADE, TRUTH)["ssim"] == pytest.approx(expected.mean(), rel=1e-5)
    assert figures(TRUTH, TRUTH)["ssim"] == pytest.approx(1, abs=1e-6)


def test_equal_and_unequal_images() -> None:
    assert figures(TRUTH, TRUTH, ssim=False) == {"psnr": math.inf, "psnr_per_image": math.inf}
    with pytest.raises(ConfigurationError, match="one by one"):
        Pairs().add(MADE, TRUTH[:, :, :32])


def test_a_network_that_returns_nan_is_refused() -> None:
    class Broken(torch.nn.Module):
        def forward(self, made: torch.Tensor, truth: torch.Tensor, normalize: bool) -> torch.Tensor:
            return (made - truth).mean((1, 2, 3)) / 0

    with pytest.raises(EvaluationError, match="lpips is nan; look at"):
        figures(TRUTH, TRUTH, ssim=False, lpips=Broken())


def test_lpips_equals_that_of_torchmetrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With random weights of AlexNet, in the file that torchvision would have."""
    pytest.importorskip("lpips")
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    path = tmp_path / "alexnet-owt-7be5be79.pth"
    torch.save(torchvision.models.alexnet().state_dict(), path)
    found = figures(MADE, TRUTH, ssim=False, lpips=lpips_network(path))["lpips"]
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: torch.load(path))
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda *_, **__: torch.load(path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        metric = LearnedPerceptualImagePatchSimilarity("alex", normalize=True)
    metric.update(MADE.float() / 255, TRUTH.float() / 255)
    assert found == pytest.approx(metric.compute().item(), rel=1e-6)
    assert found > 0
    torch.save({"features.0.weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match=r"alexnet-owt-7be5be79.pth does not hold"):
        lpips_network(path)
