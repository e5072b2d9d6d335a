"""The Fréchet distance between two sets of features (arXiv 1706.08500), from sums that features are added to."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import scipy.linalg
import torch
from torch import Tensor

from fxquant.errors import ConfigurationError, EvaluationError

Array = npt.NDArray[np.float64]


@dataclass
class Moments:
    """Number, mean and summed squared deviations of features, in float64; needs no memory per image.

    Two sets are merged as in Chan, Golub and LeVeque (1979), so that a large mean costs no digits.

    Attributes:
        count: Number of images.
        mean: ``[d]``.
        deviations: ``[d, d]``, the sum of ``(x - mean) (x - mean)^T``.
    """

    count: int = 0
    mean: Array = field(default_factory=lambda: np.zeros(0))
    deviations: Array = field(default_factory=lambda: np.zeros((0, 0)))

    def add(self, features: Tensor) -> None:
        """Add the features of some images.

        Args:
            features: ``[n, d]``.

        Raises:
            ConfigurationError: If their number of dimensions differs from earlier ones.
            EvaluationError: If they are not finite.
        """
        x = features.detach().to("cpu", torch.float64).numpy()
        if x.ndim != 2 or (self.count and x.shape[1] != len(self.mean)):
            wanted = f"[n, {len(self.mean)}]" if self.count else "[n, d]"
            raise ConfigurationError(f"features have shape {tuple(x.shape)} where {wanted} is needed")
        if not len(x):
            return
        if not np.isfinite(x).all():
            raise EvaluationError(
                "the features hold NaN or infinity; look at the images, and at the weights of the feature extractor"
            )
        mean = x.mean(axis=0)
        centred = x - mean
        self.merge(Moments(len(x), mean, centred.T @ centred))

    def merge(self, other: Moments) -> None:
        """Add the images of another set."""
        if not self.count:
            self.count, self.mean, self.deviations = other.count, other.mean.copy(), other.deviations.copy()
            return
        if not other.count:
            return
        total = self.count + other.count
        step = other.mean - self.mean
        self.deviations = self.deviations + other.deviations + np.outer(step, step) * (self.count * other.count / total)
        self.mean = self.mean + step * (other.count / total)
        self.count = total

    @property
    def covariance(self) -> Array:
        """The unbiased covariance ``[d, d]``, as ``numpy.cov`` computes it."""
        return self.deviations / max(self.count - 1, 1)


def frechet_distance(mean: Array, covariance: Array, other_mean: Array, other_covariance: Array) -> float:
    """``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`` in float64.

    The trace of the root is computed as that of ``(C1^(1/2) C2 C1^(1/2))^(1/2)``, which is equal, symmetric, and exists
    for singular covariances too.

    Args:
        mean: ``[d]``, of the first set.
        covariance: ``[d, d]``.
        other_mean: ``[d]``, of the second set.
        other_covariance: ``[d, d]``.

    Raises:
        ConfigurationError: If the numbers of features differ.
        EvaluationError: If the distance is not a finite number.
    """
    if mean.shape != other_mean.shape or covariance.shape != other_covariance.shape:
        raise ConfigurationError(
            f"the two sets have {len(mean)} and {len(other_mean)} features; they must come from one feature extractor"
        )
    difference = np.asarray(mean, np.float64) - np.asarray(other_mean, np.float64)
    first, second = np.asarray(covariance, np.float64), np.asarray(other_covariance, np.float64)
    values, vectors = scipy.linalg.eigh(first)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    inner = scipy.linalg.eigvalsh(root @ second @ root)
    trace = np.trace(first) + np.trace(second) - 2 * np.sqrt(inner.clip(0)).sum()
    found = float(difference @ difference + trace)
    if not math.isfinite(found):
        raise EvaluationError(f"the Fréchet distance is {found}; the features or the statistics are too large")
    return max(0.0, found)  # Rounding can make a distance of zero slightly negative.
