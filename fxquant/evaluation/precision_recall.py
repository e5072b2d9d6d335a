"""Improved precision and recall (Kynkäänniemi and others, arXiv 1904.06991), on features.

A set's manifold is the union of balls around its features, each as large as the distance to its k-th nearest neighbour
in the set. Precision is the share of generated images within the manifold of the real ones; recall is the reverse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.errors import ConfigurationError

NEIGHBOURS = 3
"""k, as in the paper and in ADM's evaluation."""

_ROWS = 2048  # Distances of so many images are in memory at a time.


def precision_recall(generated: Tensor, real: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Precision and recall, each 0 to 1; distances are computed in float64.

    Args:
        generated: Features ``[n, d]``.
        real: Features ``[m, d]``.
        neighbours: Which nearest neighbour gives the size of a ball.

    Raises:
        ConfigurationError: If the numbers of features differ, or a set has no more images than ``neighbours``.
    """
    if generated.ndim != 2 or real.ndim != 2 or generated.shape[1] != real.shape[1]:
        raise ConfigurationError(
            f"features of shapes {tuple(generated.shape)} and {tuple(real.shape)} do not come from one extractor"
        )
    if min(len(generated), len(real)) <= neighbours:
        raise ConfigurationError(
            f"precision and recall need more than {neighbours} images of each kind; there are {len(generated)} and "
            f"{len(real)}"
        )
    made, truth = generated.detach().double(), real.detach().double()
    radii_made, radii_truth = _radii(made, neighbours), _radii(truth, neighbours)
    # One sweep over the distances between the sets: each row block decides its images, and adds to those of the others.
    precise = 0
    recalled = torch.zeros(len(truth), dtype=torch.bool, device=truth.device)
    for rows, radii in zip(made.split(_ROWS), radii_made.split(_ROWS), strict=True):
        distances = torch.cdist(rows, truth)
        precise += int((distances <= radii_truth).any(dim=1).sum())
        recalled |= (distances <= radii[:, None]).any(dim=0)
    return precise / len(made), recalled.double().mean().item()


def _radii(features: Tensor, neighbours: int) -> Tensor:
    """Distance to the k-th nearest other feature; the nearest of all is the feature itself."""
    return torch.cat(
        [torch.cdist(rows, features).kthvalue(neighbours + 1, dim=1).values for rows in features.split(_ROWS)]
    )
