"""Metrics on inputs whose figures are known."""

import math

import pytest
import torch

from examples.digits import digits, frechet_distance, psnr, read_accuracy
from examples.digits.judge import features
from examples.digits.rows import evaluated


def test_psnr() -> None:
    image = torch.zeros(2, 3, 4, 4)
    assert psnr(image, image) == math.inf
    assert psnr(image + 0.1, image) == pytest.approx(20.0, abs=1e-4)
    assert psnr(image + 0.1, image, peak=2.0) == pytest.approx(20 + 20 * math.log10(2), abs=1e-4)
    with pytest.raises(ValueError, match="shapes"):
        psnr(image, image[:1])


def test_read_accuracy() -> None:
    class FirstPixel(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.stack([-images[:, 0, 0, 0], images[:, 0, 0, 0]], dim=1)

    images = torch.zeros(4, 3, 2, 2)
    images[:3] = 1
    assert read_accuracy(images, torch.tensor([1, 1, 0, 0]), FirstPixel()) == 0.75
    with pytest.raises(ValueError, match="labels"):
        read_accuracy(images, torch.tensor([1]), FirstPixel())


def test_frechet_distance_is_zero_for_equal_sets_and_grows(classifier) -> None:
    real = digits("held_back")[0] / 2 + 0.5
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    same, near, far = (frechet_distance(real, (real + s * noise).clamp(0, 1), classifier) for s in (0.0, 0.1, 0.4))
    assert same == pytest.approx(0, abs=1e-8)
    assert same < near < far


def test_frechet_distance_equals_its_definition(classifier) -> None:
    """Against the closed form with a matrix square root, on features rather than through torchmetrics."""
    from scipy.linalg import sqrtm

    real, other = digits("held_back")[0] / 2 + 0.5, digits("train")[0][:500] / 2 + 0.5
    a, b = (classifier.features(2 * x - 1).double().numpy() for x in (real, other))
    ca, cb = ((x - x.mean(0)).T @ (x - x.mean(0)) / (len(x) - 1) for x in (a, b))
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + (ca + cb - 2 * sqrtm(ca @ cb).real).trace()
    assert frechet_distance(real, other, classifier) == pytest.approx(expected, rel=1e-4)


def test_frechet_distance_needs_enough_images(classifier) -> None:
    with pytest.raises(ValueError, match="needed"):
        frechet_distance(torch.rand(64, 3, 32, 32), torch.rand(64, 3, 32, 32), classifier)


def test_the_classifier_is_a_feature_extractor(classifier) -> None:
    images = digits("held_back")[0][:3]
    found = features()((images + 1) / 2)
    assert torch.equal(found["features"], classifier.features(2 * ((images + 1) / 2) - 1))
    assert torch.allclose(found["logits"], classifier(images), atol=1e-4)


def test_the_demo_evaluates_a_model(pipe, classifier, tmp_path) -> None:
    real = digits("held_back")[0][:100] / 2 + 0.5
    found = evaluated(pipe, pipe.transformer, real, classifier, 4, tmp_path)
    assert found is not None and found["psnr"] == math.inf and found.images == 4
    assert "needs at least 65 images" in found.left_out["fid"]
    assert (tmp_path / "evaluation.json").is_file() and (tmp_path / "evaluation.png").is_file()
