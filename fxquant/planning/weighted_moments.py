"""Second moments in which timesteps have weights, from moments over all timesteps and rows sampled at each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

_DAMPING = 0.01  # Of the mean of the diagonal; as GPTQ's, so that few rows do not make the factors singular.


def weighted_moments(
    recorded: Tensor, rows: Sequence[Tensor], timesteps: Sequence[float], weights: Mapping[float, float]
) -> Tensor:
    """Second moments sum_t alpha_t E[x_t x_t^T], with weights alpha_t whose mean over the timesteps is 1.

    The recorded moments M are of many rows and of no weights. Let U and W be the moments of the sampled rows without
    and with weights, each with d added to the diagonal, and M + d = L L^T and U = K K^T with lower triangular L and K.
    The result is A W A^T - d with A = L K^-1. So equal weights give M again, and the noise of a small sample cancels in
    part.

    Args:
        recorded: Moments of all rows, float64 ``[C, C]``.
        rows: Sampled rows at each timestep, T tensors ``[n, C]``.
        timesteps: Their timesteps, ascending.
        weights: Weight by timestep, at some timesteps; in between they are interpolated on a logarithmic scale.

    Returns:
        The moments, float64 ``[C, C]``; ``recorded`` itself if no row has a weight or was sampled.
    """
    shares = interpolated(weights, timesteps)
    sizes = np.array([len(own) for own in rows], dtype=np.float64)
    if not len(sizes) or not float((shares * sizes).sum()):
        return recorded
    squares = [own.double().T @ own.double() / max(len(own), 1) for own in rows]
    found = torch.stack(squares).to(recorded.device)
    shares = shares / shares.mean()
    weighted = torch.einsum("t,tij->ij", torch.from_numpy(shares).to(found), found) / len(found)
    damping = _DAMPING * recorded.diagonal().mean() * torch.eye(len(recorded), dtype=torch.float64).to(recorded.device)
    upper = torch.linalg.cholesky(recorded + damping)
    lower = torch.linalg.cholesky(found.mean(0) + damping)
    # A = L K^-1 solves A K = L; K is triangular.
    change = torch.linalg.solve_triangular(lower, upper, upper=False, left=False)
    found = change @ (weighted + damping) @ change.T - damping
    return (found + found.T) / 2


def interpolated(weights: Mapping[float, float], timesteps: Sequence[float]) -> np.ndarray:
    """Weights at other timesteps, float64 ``[T]``: linear in the logarithm between the known ones, constant beyond."""
    known = sorted(step for step, weight in weights.items() if weight > 0)
    if not known:
        return np.zeros(len(timesteps))
    return np.exp(np.interp(timesteps, known, [np.log(weights[step]) for step in known]))
