"""The Fréchet distance equals its definition and that of libraries on equal features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor, nn

from fxquant.errors import ConfigurationError, EvaluationError
from fxquant.evaluation.frechet import Moments, frechet_distance


def moments(features: Tensor, batch: int = 64) -> Moments:
    found = Moments()
    for part in features.split(batch):
        found.add(part)
    return found


def distance(first: Moments, second: Moments) -> float:
    return frechet_distance(first.mean, first.covariance, second.mean, second.covariance)


def test_moments_are_those_of_numpy(two_sets: tuple[Tensor, Tensor]) -> None:
    features = two_sets[0].double().numpy()
    found = moments(two_sets[0], 17)
    assert found.count == len(features)
    np.testing.assert_allclose(found.mean, features.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(found.covariance, np.cov(features, rowvar=False), rtol=1e-9, atol=1e-11)


def test_merged_moments_are_those_of_all_images(two_sets: tuple[Tensor, Tensor]) -> None:
    parts = [moments(part) for part in two_sets[0].split(250)]
    merged = Moments()
    for part in (Moments(), *parts, Moments()):
        merged.merge(part)
    whole = moments(two_sets[0])
    np.testing.assert_allclose(merged.covariance, whole.covariance, rtol=1e-11)
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-14)
    before = parts[0].mean.copy()
    merged.add(two_sets[1])
    np.testing.assert_array_equal(parts[0].mean, before)  # The first merged set is not an alias of the sum.


def test_moments_keep_digits_beside_a_large_mean() -> None:
    """Sums of squares in float64 lose all digits of this variance."""
    features = 1e8 + torch.arange(1000, dtype=torch.float64)[:, None] % 7
    assert moments(features).covariance[0, 0] == pytest.approx(np.cov(features.numpy()[:, 0] - 1e8), rel=1e-9)


def test_distance_equals_its_definition(two_sets: tuple[Tensor, Tensor]) -> None:
    a, b = (x.double().numpy() for x in two_sets)
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second - 2 * sqrtm(first @ second).real)
    assert distance(*map(moments, two_sets)) == pytest.approx(expected, rel=1e-6)


def test_distance_equals_that_of_torchmetrics(two_sets: tuple[Tensor, Tensor]) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Pixels(nn.Module):
        num_features = 24

        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1).double()

    metric = FrechetInceptionDistance(feature=Pixels()).set_dtype(torch.float64)
    for features, real in zip(two_sets, (True, False), strict=True):
        metric.update(features.reshape(len(features), 3, 2, 4), real=real)
    assert distance(*map(moments, two_sets)) == pytest.approx(metric.compute().item(), rel=1e-6)


def test_distance_equals_that_of_torch_fidelity(two_sets: tuple[Tensor, Tensor]) -> None:
    fidelity = pytest.importorskip("torch_fidelity.metric_fid")
    known = [fidelity.fid_features_to_statistics(x.double()) for x in two_sets]
    expected = fidelity.fid_statistics_to_metric(*known, verbose=False)["frechet_inception_distance"]
    assert distance(*map(moments, two_sets)) == pytest.approx(expected, rel=1e-6)


def test_distance_of_equal_and_of_singular_sets(two_sets: tuple[Tensor, Tensor]) -> None:
    whole = moments(two_sets[0])
    assert distance(whole, whole) == pytest.approx(0, abs=1e-8)
    few = moments(two_sets[0][:5])  # Rank 4 of 24.
    shifted = moments(two_sets[0][:5] + 1)
    assert distance(few, shifted) == pytest.approx(24, rel=1e-4)


def test_wrong_features_are_refused(two_sets: tuple[Tensor, Tensor]) -> None:
    found = moments(two_sets[0])
    with pytest.raises(ConfigurationError, match=r"\[n, 24\]"):
        found.add(torch.zeros(3, 5))
    with pytest.raises(ConfigurationError, match="one feature extractor"):
        distance(found, moments(torch.randn(30, 5)))
    with pytest.raises(EvaluationError, match="NaN"):
        found.add(torch.full((2, 24), float("nan")))
    assert found.count == len(two_sets[0])


def test_a_distance_of_nan_does_not_pass_as_zero() -> None:
    for mean in (1e200, np.nan):
        with pytest.raises(EvaluationError, match="the Fréchet distance is"):
            frechet_distance(np.full(2, mean), np.eye(2), np.zeros(2), np.eye(2))
