"""GPTQ: rounds the weights of one input channel after the other and compensates the error in the later channels.

E. Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (arXiv
2210.17323). With inputs x of second moments H = E[x x^T], rounding W to Q causes the output error
tr((W - Q) H (W - Q)^T). For the input channels in some order, let H^-1 = U^T U with U upper triangular. Let e_i be
column i minus its rounded values. The least error remains if every later column j moves by -e_i U_ij / U_ii.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.linalg import lapack
from torch import Tensor

from fxquant.errors import ConfigurationError, NonFiniteError
from fxquant.memory.mappings import drop_values
from fxquant.numerics.finite import within_float32
from fxquant.numerics.formats import FORMATS, Scales
from fxquant.numerics.ranges import RangeMethod
from fxquant.numerics.weights import QuantizedWeight, group_count, weight_scales

_BLOCK = 128  # Columns whose errors are propagated to all later columns at once.
_DAMPINGS = 6  # Attempts; each adds ten times as much as the previous one.


@dataclass(frozen=True, eq=False)
class ErrorFeedback:
    """How later input channels compensate the error of each one. All layers that read one value share an instance.

    Attributes:
        order: Input channels in the order in which they are rounded, int64 ``[in]``.
        factor: U of the module's docstring, its rows and columns in that order, float32 ``[in, in]``.
        importance: Mean square of each input channel, in the original order, float32 ``[in]``.
    """

    order: Tensor
    factor: Tensor
    importance: Tensor

    @classmethod
    def of(
        cls, moments: Tensor, damping: float = 0.01, activation_order: bool = True, *, overwrite: bool = False
    ) -> ErrorFeedback:
        """Factorize second moments.

        Args:
            moments: ``E[x x^T]``, ``[in, in]`` of any float dtype.
            damping: Added to the diagonal, as a share of its mean. If the matrix cannot be factorized then, ten times
                as much is added, and so on.
            activation_order: Round the channels with the largest inputs first, while most others can still compensate.
            overwrite: Whether ``moments`` may be overwritten, which saves a copy if they are float64 on the CPU.

        Raises:
            NonFiniteError: The moments hold NaN or infinity, or no damping makes them positive definite.
        """
        moments = within_float32(moments)
        squares = moments.diagonal().to(torch.float32).clone()
        order = squares.argsort(descending=True, stable=True) if activation_order else torch.arange(len(squares))
        backwards = order.cpu().numpy()[::-1]
        matrix = moments.detach().cpu().double().numpy()
        if not (overwrite or moments.dtype != torch.float64 or moments.device.type != "cpu"):
            matrix = matrix.copy()
        del moments  # As large as everything else here together; the caller may hold no reference.
        _permute(matrix, backwards)
        diagonal = matrix.diagonal().copy()
        if not (np.isfinite(matrix.min()) and np.isfinite(matrix.max())):
            raise NonFiniteError("the second moments of a layer's input hold NaN or infinity")
        dead = diagonal == 0
        diagonal[dead] = 1.0  # No input was seen on these: each is rounded to nearest, independently.
        share = damping * float(diagonal.mean())
        for attempt in range(_DAMPINGS):
            if attempt:
                for row in range(len(matrix)):  # The strict lower triangle is unchanged.
                    matrix[row, row + 1 :] = matrix[row + 1 :, row]
            np.fill_diagonal(matrix, diagonal + share * 10.0**attempt)
            factor = _inverse_factor(matrix)
            if factor is not None:
                return cls(order, torch.from_numpy(factor), squares)
        raise NonFiniteError(
            f"the second moments of a layer's input cannot be factorized even with {damping * 10 ** (_DAMPINGS - 1):g} "
            "of their mean added to the diagonal; calibrate with more or other samples, or round this layer to nearest"
        )


def _inverse_factor(backwards: npt.NDArray[np.float64]) -> npt.NDArray[np.float32] | None:
    """U, upper triangular, with ``U^T U`` the inverse of a matrix; None if the matrix is not positive definite.

    Args:
        backwards: The matrix with both axes reversed. It is overwritten, because a matrix may be too large for a copy.
            If there is no U, the strict lower triangle is unchanged.
    """
    # With both axes reversed, a Cholesky factor L becomes R, upper triangular, with matrix = R R^T. U = R^-1 is L^-1
    # reversed. LAPACK works in place on the transpose, which has the order of elements that LAPACK needs.
    lower, failed = lapack.dpotrf(backwards.T, lower=1, clean=0, overwrite_a=1)
    if failed:
        return None
    lower, failed = lapack.dtrtri(lower, lower=1, overwrite_c=1)
    if failed:
        return None
    columns = lower.T  # Row j holds column j of L^-1, from the diagonal on.
    blocks = [(start, min(start + _BLOCK, len(columns))) for start in range(0, len(columns), _BLOCK)]
    if not all(np.isfinite(columns[start:stop, start:].astype(np.float32)).all() for start, stop in blocks):
        return None
    factor = np.zeros(columns.shape, dtype=np.float32)
    for start, stop in blocks:  # The factor grows by half of what the matrix loses, so both together never grow.
        own = columns[len(columns) - stop : len(columns) - start]
        factor[:stop, start:stop] = own[::-1, ::-1][:, :stop].T
        factor[start:stop, start:stop] = np.triu(factor[start:stop, start:stop])
        drop_values(own)
    return factor


def _permute(matrix: npt.NDArray[np.float64], order: npt.NDArray[np.int64]) -> None:
    """Set a matrix to ``matrix[order][:, order]`` in its own memory, which may be most of what there is."""
    left = np.ones(len(order), dtype=bool)
    for start in range(len(order)):
        if not left[start]:
            continue
        first, place = matrix[start].copy(), start
        while order[place] != start:  # Along a cycle of the permutation.
            matrix[place] = matrix[order[place]]
            left[place] = False
            place = order[place]
        matrix[place] = first
        left[place] = False
    for row in matrix:
        row[:] = row[order]


def gptq(
    weight: Tensor,
    feedback: ErrorFeedback,
    *,
    format: str,
    group_size: int = 0,
    group_rows: int = 1,
    symmetric: bool = False,
    method: RangeMethod = "minmax",
) -> QuantizedWeight:
    """Round a weight so that the error of the layer's output is small.

    The scales are those of rounding to nearest, computed from the original weight. Time is O(out in^2).

    Args:
        weight: ``[out, in]``, any float dtype, finite.
        feedback: The error feedback for the inputs of the layer.
        format: Name of the number format. The scales are fixed before the first element is rounded.
        group_size: Input channels that share a grid; 0 for all of them.
        group_rows: Output channels that share a scale; 0 for all of them.
        symmetric: Fix zero points at ``2**(bits - 1)``.
        method: How the ranges are chosen, weighted by the mean squares of the inputs; see
            :func:`fxquant.numerics.ranges.weight_range`.

    Raises:
        ConfigurationError: As :func:`fxquant.numerics.weights.quantize_weight`, or if the number of inputs differs from
            the number of columns.
    """
    in_features = weight.shape[1]
    if len(feedback.order) != in_features:
        raise ConfigurationError(
            f"a weight of {in_features} input channels was given the moments of {len(feedback.order)} channels."
        )
    groups = group_count(in_features, group_size)
    kind = FORMATS[format]
    scales = weight_scales(
        weight.detach().to(torch.float32),
        format=format,
        group_size=group_size,
        group_rows=group_rows,
        symmetric=symmetric,
        method=method,
        importance=None if method == "minmax" else feedback.importance.to(weight.device),
    )

    order, factor = feedback.order.to(weight.device), feedback.factor.to(weight.device)
    group_of = (order // (in_features // groups)).tolist()
    # Input channels first: each step works on one row and on the rows after it.
    left = weight.detach().to(torch.float32).T[order].contiguous()
    grids = _by_group(scales, weight.shape[0])
    for start in range(0, in_features, _BLOCK):
        stop = min(start + _BLOCK, in_features)
        block, inner = left[start:stop], factor[start:stop, start:stop]
        errors = torch.empty_like(block)
        for i in range(stop - start):
            grid = grids[group_of[start + i]]
            rounded = kind.round(block[i], grid)
            torch.sub(block[i], rounded, out=errors[i])
            block[i] = rounded
            errors[i] /= inner[i, i]
            block[i + 1 :].addr_(inner[i, i + 1 :], errors[i], alpha=-1.0)
        left[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1.0)
    placed = torch.empty_like(left)
    placed[order] = left  # Values of the grid, whose codes are found once for all.
    parts = [kind.encode(part, grid) for part, grid in zip(placed.chunk(groups), grids, strict=True)]
    return QuantizedWeight.from_codes(torch.cat(parts).T.contiguous(), scales, format=format, group_size=group_size)


def _by_group(scales: Scales, out_features: int) -> list[Scales]:
    """The scales of each group of input channels, ``[out]``."""

    def split(grid: Tensor) -> list[Tensor]:
        each = grid.repeat_interleave(out_features // max(1, len(grid)), 0)
        return list(each.T.contiguous().unbind())

    steps = split(scales.scale)
    zeros = [None] * len(steps) if scales.zero_point is None else split(scales.zero_point)
    return [Scales(step, zero, scales.global_scale) for step, zero in zip(steps, zeros, strict=True)]
