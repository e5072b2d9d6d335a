"""Signal to quantization noise ratios."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fxquant.errors import ConfigurationError
from fxquant.numerics.slices import map_slices, slices_of


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """Signal to quantization noise ratio in dB, `10 log10(sum reference^2 / sum (reference - approximation)^2)`.

    Accumulated in float64. Infinite if the two are equal; minus infinity if the reference is 0 and they are not equal.

    Raises:
        ConfigurationError: The shapes differ.
    """
    if reference.shape != approximation.shape:
        raise ConfigurationError(
            f"the reference has shape {tuple(reference.shape)}, but the approximation has {tuple(approximation.shape)}."
        )
    reference, approximation = reference.detach().flatten(), approximation.detach().flatten()
    return decibels(map_slices(energies_of, list(zip(slices_of(reference), slices_of(approximation), strict=True))))


def decibels(energies: Sequence[tuple[float, float]]) -> float:
    """Decibels of the summed energies of slices, as :func:`energies_of` returns them."""
    return snr_db(*(sum(side) for side in zip(*energies, strict=True)))


def snr_db(signal: float, noise: float) -> float:
    """The ratio of two energies in decibels; infinite without noise, minus infinity without a signal.

    Infinite noise makes it minus infinity, NaN in one of the energies NaN.
    """
    if noise == 0.0:
        return math.inf
    if math.isnan(signal) or math.isnan(noise):
        return math.nan
    return 10.0 * math.log10(signal / noise) if signal > 0.0 and math.isfinite(noise) else -math.inf


def energies_of(reference: Tensor, approximation: Tensor) -> tuple[float, float]:
    """Energy of a vector and of its error, in float64."""
    exact = reference.to(torch.float64)
    error = approximation.to(torch.float64) - exact
    return exact.dot(exact).item(), error.dot(error).item()
