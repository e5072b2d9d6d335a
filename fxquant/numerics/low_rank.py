"""Approximations of a weight by a product of low rank."""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = 1e-12  # Share of the mean below which the importance of an input channel counts as that.


def low_rank_factors(weight: Tensor, rank: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Factors whose product is the best approximation of a weight of a rank.

    Smallest is the sum over all elements of ``importance_j (W - L1 L2)_ij ** 2``. With the mean squares of the input
    channels as importance, and independent channels, this is the error of the layer's output. Both factors carry the
    root of each singular value, so that they have similar magnitudes, which matters in 16 bits.

    Args:
        weight: ``[out, in]``, any float dtype.
        rank: 1 to the smaller of ``out`` and ``in``.
        importance: Weight of the error in each column, ``[in]``; all count equally if None.

    Returns:
        L1 ``[out, rank]`` and L2 ``[rank, in]``, float64.
    """
    values = weight.detach().double()
    root = None
    if importance is not None:
        mean = importance.double().mean()
        floor = torch.where(mean > 0, mean * _TINY, 1.0)  # Channels that calibration saw as 0 only.
        root = importance.double().clamp_min(floor).sqrt().to(values.device)
        values = values * root
    rows, columns = values.shape
    # The eigenvectors of the smaller Gram matrix: a decomposition of the whole weight would take several times as long.
    gram = values @ values.T if rows <= columns else values.T @ values
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)
    left, right = (vectors, vectors.T @ values) if rows <= columns else (values @ vectors, vectors.T)
    size = (right.norm(dim=1) if rows <= columns else left.norm(dim=0)).sqrt()
    size = torch.where(size > 0, size, torch.ones_like(size))
    left, right = (left * size, right / size[:, None]) if rows <= columns else (left / size, right * size[:, None])
    return left, right if root is None else right / root
