"""How later input channels compensate the rounding error of each one: a factor of the inverse second moments.

Inputs x have the second moments H = E[x x^T], damped by lambda on the diagonal. H^-1 = U^T U with upper triangular U.
GPTQ (:mod:`fxquant.numerics.rounding.gptq`) reads the rows of U, block by block of columns.

H of n channels has n^2 elements, and U takes O(n^3) operations. If it is made of few rows, H = lambda + X^T X with X of
T << n rows, U never exists as a whole. Let B be the columns of a block, L all later ones, and M = lambda + X_L X_L^T,
which is ``[T, T]``. By the push-through identity, X_L^T (lambda + X_L X_L^T)^-1 = (lambda + X_L^T X_L)^-1 X_L^T, so

* U_BB^T U_BB = S^-1 with S = lambda (1 + X_B^T M^-1 X_B), the Schur complement of L in what is left of H;
* U_BL = -V_B X_L with V_B = U_BB X_B^T M^-1.

So errors reach later columns through T numbers per output channel, in O(n T^2) and O(n T out) operations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from scipy.linalg import LinAlgError, cho_factor, cho_solve, lapack
from torch import Tensor

from fxquant.errors import NonFiniteError
from fxquant.memory.mappings import drop_values
from fxquant.numerics.finite import divided, within_float32

BLOCK = 128
"""Columns whose errors are propagated to all later columns at once."""
FEW = 4
"""Rows are few if there are this many times as many channels: neither way costs more operations then."""

_DAMPINGS = 6  # Attempts; each adds ten times as much as the previous one.


class Propagation(Protocol):
    """Carries errors of blocks of columns to the later ones. Blocks are visited in order."""

    def enter(self, start: int, stop: int) -> Tensor:
        """Correct the columns of a block for the errors of all earlier blocks; returns U of the block."""

    def leave(self, start: int, stop: int, errors: Tensor) -> None:
        """Take the errors of a block, each divided by its element of U's diagonal: float32 ``[stop - start, out]``."""


@dataclass(frozen=True, eq=False)
class Factor:
    """U as a matrix, float32 ``[in, in]``."""

    matrix: Tensor

    def propagation(self, left: Tensor) -> Propagation:
        """For the columns ``left``, float32 ``[in, out]``, which are updated in place."""
        return _Directly(self.matrix.to(left.device), left)

    def whole(self) -> Tensor:
        """U."""
        return self.matrix


@dataclass(frozen=True, eq=False)
class FactorOfRows:
    """U of moments of few rows, as the module's docstring says.

    Attributes:
        inner: U_BB of each block, float32 ``[128, 128]``; the last one may be smaller.
        rows: X, float32 ``[T, in]``.
        outer: V, float32 ``[in, T]``.
    """

    inner: list[Tensor]
    rows: Tensor
    outer: Tensor

    def propagation(self, left: Tensor) -> Propagation:
        """For the columns ``left``, float32 ``[in, out]``, which are updated in place."""
        device = left.device
        inner = [block.to(device) for block in self.inner]
        return _ThroughRows(inner, self.rows.to(device), self.outer.to(device), left)

    def whole(self) -> Tensor:
        """U as a matrix, which may be large."""
        found = -(self.outer @ self.rows)
        for (start, stop), block in zip(blocks(len(found)), self.inner, strict=True):
            found[start:stop, :start] = 0
            found[start:stop, start:stop] = block
        return found


class _Directly:
    def __init__(self, matrix: Tensor, left: Tensor) -> None:
        self.matrix, self.left = matrix, left

    def enter(self, start: int, stop: int) -> Tensor:
        return self.matrix[start:stop, start:stop]

    def leave(self, start: int, stop: int, errors: Tensor) -> None:
        self.left[stop:].addmm_(self.matrix[start:stop, stop:].T, errors, alpha=-1.0)


class _ThroughRows:
    def __init__(self, inner: list[Tensor], rows: Tensor, outer: Tensor, left: Tensor) -> None:
        self.inner, self.rows, self.outer, self.left = inner, rows, outer, left
        self.carried = left.new_zeros(len(rows), left.shape[1])

    def enter(self, start: int, stop: int) -> Tensor:
        self.left[start:stop].addmm_(self.rows[:, start:stop].T, self.carried)
        return self.inner[start // BLOCK]

    def leave(self, start: int, stop: int, errors: Tensor) -> None:
        self.carried.addmm_(self.outer[start:stop].T, errors)


@dataclass(frozen=True, eq=False)
class ErrorFeedback:
    """How later input channels compensate the error of each one. All layers that read one value share an instance.

    Attributes:
        order: Input channels in the order in which they are rounded, int64 ``[in]``.
        factor: U of the module's docstring, its rows and columns in that order.
        importance: Mean square of each input channel, in the original order, float32 ``[in]``.
    """

    order: Tensor
    factor: Factor | FactorOfRows
    importance: Tensor

    @classmethod
    def of(
        cls, moments: Tensor, damping: float = 0.01, activation_order: bool = True, *, overwrite: bool = False
    ) -> ErrorFeedback:
        """Factorize second moments.

        Args:
            moments: ``E[x x^T]``, ``[in, in]`` of any float dtype.
            damping: Added to the diagonal, as a share of its mean over the channels that were seen. If the matrix
                cannot be factorized then, ten times as much is added, and so on.
            activation_order: Round the channels with the largest inputs first, while most others can still compensate.
            overwrite: Whether ``moments`` may be overwritten, which saves a copy if they are float64 on the CPU.

        Raises:
            NonFiniteError: The moments hold NaN or infinity, or no damping makes them positive definite.
        """
        moments = within_float32(moments)
        squares = moments.diagonal().to(torch.float32).clone()
        order = _order(squares, activation_order)
        backwards = order.cpu().numpy()[::-1]
        matrix = moments.detach().cpu().double().numpy()
        if not (overwrite or moments.dtype != torch.float64 or moments.device.type != "cpu"):
            matrix = matrix.copy()
        del moments  # As large as everything else here together; the caller may hold no reference.
        _permute(matrix, backwards)
        diagonal = matrix.diagonal().copy()
        if not (np.isfinite(matrix.min()) and np.isfinite(matrix.max())):
            raise NonFiniteError(_NOT_FINITE)
        diagonal += _of_unseen(diagonal)
        for attempt, share in enumerate(_shares(damping, diagonal)):
            if attempt:
                for row in range(len(matrix)):  # The strict lower triangle is unchanged.
                    matrix[row, row + 1 :] = matrix[row + 1 :, row]
            np.fill_diagonal(matrix, diagonal + share)
            factor = _inverse_factor(matrix)
            if factor is not None:
                return cls(order, Factor(torch.from_numpy(factor)), squares)
        raise _unsolvable(damping)

    @classmethod
    def of_rows(cls, rows: Tensor, damping: float = 0.01, activation_order: bool = True) -> ErrorFeedback:
        """Factorize second moments of few rows; with more than a quarter of the channels, :meth:`of` takes less time.

        Args:
            rows: X with moments X^T X, ``[n, in]`` of any float dtype.
            damping: As for :meth:`of`. The matrix is made if it is 0.
            activation_order: As for :meth:`of`.

        Raises:
            NonFiniteError: The rows hold NaN or infinity, or no damping makes their moments positive definite.
        """
        x = rows.detach().cpu().double()
        largest = float(x.abs().max()) if x.numel() else 0.0
        if not np.isfinite(largest):
            raise NonFiniteError(_NOT_FINITE)
        if not 2.0**-30 <= largest <= 2.0**30:  # As within_float32(): rounding depends only on ratios.
            x = divided(x, largest)
        if not damping:  # Then M of the module's docstring has no inverse, although the matrix may have one.
            return cls.of(x.T @ x, damping, activation_order, overwrite=True)
        squares = x.square().sum(dim=0)
        order = _order(squares.to(torch.float32), activation_order)
        x, diagonal = x[:, order], squares[order].numpy()
        unseen = _of_unseen(diagonal)
        for share in _shares(damping, diagonal + unseen):
            factor = _factor_of_rows(x.numpy(), unseen, share)
            if factor is not None:
                return cls(order, factor, squares.to(torch.float32))
        raise _unsolvable(damping)


_NOT_FINITE = "the second moments of a layer's input hold NaN or infinity"


def _unsolvable(damping: float) -> NonFiniteError:
    return NonFiniteError(
        f"the second moments of a layer's input cannot be factorized even with {damping * 10 ** (_DAMPINGS - 1):g} "
        "of their mean added to the diagonal; calibrate with more or other samples, or round this layer to nearest"
    )


def _order(squares: Tensor, activation_order: bool) -> Tensor:
    return squares.argsort(descending=True, stable=True) if activation_order else torch.arange(len(squares))


def _of_unseen(diagonal: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """What is added for channels on which no input was seen; each is rounded to nearest, whatever the number.

    It is the mean of the others, so that damping does not depend on these channels.
    """
    unseen = diagonal == 0
    return np.where(unseen, 1.0 if unseen.all() else diagonal[~unseen].mean(), 0.0)


def _shares(damping: float, diagonal: npt.NDArray[np.float64]) -> Iterator[float]:
    """What is added to the diagonal, attempt by attempt."""
    share = damping * float(diagonal.mean())
    return (share * 10.0**attempt for attempt in range(_DAMPINGS))


def is_few(rows: Tensor) -> bool:
    """Whether rows ``[n, in]`` are so few that :meth:`ErrorFeedback.of_rows` takes less time than their moments."""
    return FEW * len(rows) <= rows.shape[1]


def blocks(channels: int) -> list[tuple[int, int]]:
    """Start and stop of each block of columns, in the order of rounding."""
    return [(start, min(start + BLOCK, channels)) for start in range(0, channels, BLOCK)]


def _factor_of_rows(x: npt.NDArray[np.float64], unseen: npt.NDArray[np.float64], share: float) -> FactorOfRows | None:
    """The factor of ``x.T @ x + diag(unseen + share)``; None if this is not positive definite in float64.

    Args:
        x: X ``[T, in]``, whose columns are in the order of rounding.
        unseen: What is added to the diagonal where columns are zero: ``[in]``.
        share: lambda.
    """
    count, channels = x.shape
    left = np.zeros((count, count))
    np.fill_diagonal(left, share)
    inner: list[Tensor] = []
    outer = np.empty((channels, count), dtype=np.float32)
    for start, stop in reversed(blocks(channels)):
        own = x[:, start:stop]
        try:
            solved = cho_solve(cho_factor(left, lower=True, check_finite=False), own, check_finite=False)
        except LinAlgError:
            return None
        complement = share * (own.T @ solved)
        complement.flat[:: len(complement) + 1] += share + unseen[start:stop]
        block = _inverse_factor(np.ascontiguousarray(complement[::-1, ::-1]))
        if block is None:
            return None
        inner.append(torch.from_numpy(block))
        outer[start:stop] = block.astype(np.float64) @ solved.T
        left += own @ own.T
    if not np.isfinite(outer).all():
        return None
    return FactorOfRows(inner[::-1], torch.from_numpy(x.astype(np.float32)), torch.from_numpy(outer))


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
    parts = blocks(len(columns))
    if not all(np.isfinite(columns[start:stop, start:].astype(np.float32)).all() for start, stop in parts):
        return None
    factor = np.zeros(columns.shape, dtype=np.float32)
    for start, stop in parts:  # The factor grows by half of what the matrix loses, so both together never grow.
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
