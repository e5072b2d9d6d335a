"""Second moments of observed values (how their channels correlate), for rounding that weights errors by them.

A matrix of all pairs of channels is as large as a weight, and updating it costs as much as running a layer. So only
what a recipe asks for is recorded, from at most :data:`ROWS_PER_CALL` rows of each call. The matrix is symmetric, so
only the upper triangle is kept, in bands of rows, which take little more than half of the memory. As long as the rows
themselves take less than half of that, they are kept in place of the matrix, also in files. Whoever asks for moments
gets the matrix that the same additions in the same order give, and whoever can work with few rows gets these.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxquant.errors import CalibrationError
from fxquant.memory.bound import kept, zeros

if TYPE_CHECKING:
    from fxquant.distributed.team import Team

ROWS_PER_CALL = 1024
"""The most rows of one call that are recorded; more rows would cost much and add little information."""

_BAND = 256  # Rows of the matrix that are kept and updated together.
_SHARE = 0.5  # Of the bytes of the matrix: rows that take more are summed up.
_MOST = 2.0**40  # The largest value for float32 sums: the sum of the squares of 2^46 such values is still finite.


class SecondMoments:
    """Sums of x x^T over sampled rows x ``[C]`` of one value, with the sums of x at each timestep.

    Attributes:
        channels: C.
        sealed: Whether :meth:`seal` was called. Before the call, the sums of x x^T are in float32, or in float64 once a
            square could overflow; after the call, correlations are in float16.
        sums: Sum of the rows by timestep, float64 ``[C]``.
        counts: Number of rows by timestep.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self.channels = channels
        self.sealed = False
        self.sums: dict[float, Tensor] = {}
        self.counts: dict[float, int] = {}
        self._rows: list[Tensor] | None = []  # By call, in the dtype of the value; None once they are summed up.
        self._steps: list[float] = []  # The timestep of each of these calls.
        self._nbytes = 0  # Of these rows; counted call by call, because there may be thousands of calls.
        self._held = torch.empty(0, dtype=torch.float32, device=device)
        self._device = self._held.device
        self._scale: Tensor | None = None  # The square roots of the diagonal, ``[C]``, if correlations are held.

    def add(self, rows: Tensor, timestep: float) -> None:
        """Add rows ``[n, C]`` seen at one timestep. They may be held, so nobody may write into them afterwards."""
        self.check_open()
        if not len(rows):
            return
        if not rows.is_floating_point():
            rows = rows.to(torch.float32)
        total = rows.to(torch.float32).sum(dim=0, dtype=torch.float64)
        self.sums[timestep] = self.sums[timestep] + total if timestep in self.sums else total
        self.counts[timestep] = self.counts.get(timestep, 0) + len(rows)
        if self._rows is None:
            self._sum(rows)
            return
        self._hold([kept(rows)], [timestep])

    def _hold(self, rows: Sequence[Tensor], steps: Sequence[float]) -> None:
        """Hold the rows of further calls; if that makes them too many, or of two dtypes, hold the matrix instead."""
        assert self._rows is not None
        self._rows += rows
        self._steps += steps
        self._nbytes += sum(some.nbytes for some in rows)
        first = self._rows[0]
        same = all(some.dtype == first.dtype and some.device == first.device for some in rows)
        if not same or _too_many(self._nbytes, self.channels):
            self._sum_up()

    def _sum_up(self) -> None:
        """Hold the matrix in place of the rows."""
        if self._rows is None:
            return
        rows, self._rows, self._steps, self._nbytes = self._rows, None, [], 0
        # One allocation, because freeing many small ones would fragment the memory.
        self._held = zeros((_size(self.channels),), torch.float32, self._device)
        for some in rows:
            self._sum(some)
        if self.sealed:
            self._to_correlations()

    def _sum(self, rows: Tensor) -> None:
        rows = rows.to(torch.float32)
        if float(rows.abs().max()) > _MOST:
            self._widen()
        rows = rows.to(self._held.dtype)
        for number, band in enumerate(self.bands):
            right = rows[:, number * _BAND :]
            band.addmm_(right[:, : len(band)].T, right)

    def _summed(self) -> SecondMoments:
        """These moments with the matrix, which is dropped with the object if these hold rows."""
        if self._rows is None:
            return self
        made = copy.copy(self)
        made._sum_up()
        return made

    def _widen(self) -> None:
        held, self._held = self._held, zeros(self._held.shape, torch.float64, self._held.device)
        self._held.copy_(held)

    def merge(self, other: SecondMoments) -> None:
        """Add what another run saw."""
        self.check_open()
        other.check_open()
        if self._rows is None or other._rows is None:
            self._sum_up()
            other = other._summed()
            if other._held.dtype == torch.float64:
                self._widen()
            for ours, theirs in zip(self.bands, other.bands, strict=True):
                ours.add_(theirs.to(ours.device))
        else:
            self._hold([rows.to(self._device) for rows in other._rows], other._steps)
        for timestep, sums in other.sums.items():
            total = sums.to(self._held.device)
            self.sums[timestep] = self.sums[timestep] + total if timestep in self.sums else total.clone()
            self.counts[timestep] = self.counts.get(timestep, 0) + other.counts[timestep]

    def sum_over(
        self, team: Team, dtype: torch.dtype, parts: Sequence[tuple[Mapping[float, Tensor], Mapping[float, int]]]
    ) -> None:
        """Add up the moments of all ranks of a team, each of which calls this method of its own.

        Args:
            team: The ranks.
            dtype: The widest dtype of their sums.
            parts: Sums and counts by timestep of the ranks that recorded any, in the order of the ranks.
        """
        self.check_open()
        self._sum_up()
        if dtype == torch.float64:
            self._widen()
        team.add_up(self._held)
        self.sums, self.counts = {}, {}
        for sums, counts in parts:
            for timestep, some in sums.items():
                total = some.to(self._held.device)
                self.sums[timestep] = self.sums[timestep] + total if timestep in self.sums else total.clone()
                self.counts[timestep] = self.counts.get(timestep, 0) + counts[timestep]

    def seal(self) -> None:
        """Halve the memory; nothing can be added after that.

        Correlations, -1 to 1, are rounded to float16. The error is at most 2^-12 of the two channels' root mean
        squares, far less than the change from another sample of rows.
        """
        if not self.sealed:
            self.sealed = True
            if self._rows is None:
                self._to_correlations()

    def _to_correlations(self) -> None:
        bands = self.bands
        self._scale = torch.cat([band.diagonal() for band in bands]).sqrt()
        inverse = torch.where(self._scale > 0, 1 / self._scale, 0.0)
        self._held = zeros(self._held.shape, torch.float16, self._held.device)
        for number, (sealed, band) in enumerate(zip(self.bands, bands, strict=True)):
            start = number * _BAND
            sealed.copy_(band * inverse[start : start + len(band), None] * inverse[start:])

    def check_open(self) -> None:
        """Check that rows can be added to these moments and that they can be stored.

        Raises:
            CalibrationError: They are sealed.
        """
        if self.sealed:
            raise CalibrationError(
                "these statistics were reduced to what rounding needs, so they can be neither saved nor added to; to "
                "keep statistics, pass your own: fxquant.compile(..., statistics=fxquant.Statistics())"
            )

    @property
    def rows_held(self) -> int:
        """The number of rows that :meth:`rows` gives; 0 if the matrix is held."""
        return sum(self.counts.values()) if self._rows else 0

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the sums of x x^T."""
        self._sum_up()
        return self._held.dtype

    @property
    def device(self) -> torch.device:
        """Where the sums are."""
        return self._device

    def to(self, device: torch.device | str) -> SecondMoments:
        """Move all sums to a device; returns the object."""
        self._held = self._held.to(device)
        self._device = self._held.device
        if self._rows is not None:
            self._rows = [rows.to(device) for rows in self._rows]
        self.sums = {timestep: total.to(device) for timestep, total in self.sums.items()}
        return self

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._held.nbytes + self._nbytes + 8 * len(self.sums) * self.channels

    @property
    def bands(self) -> list[Tensor]:
        """Views of the upper triangle's rows: band i is ``[256, C - 256 i]``; the last band may have fewer rows."""
        self._sum_up()
        return _pieces(self._held, _shapes(self.channels))

    @property
    def matrix(self) -> Tensor:
        """The sums of x x^T, float64 ``[C, C]``, as a new tensor."""
        summed = self._summed()
        whole = torch.empty(self.channels, self.channels, dtype=torch.float64, device=self._device)
        for number, band in enumerate(summed.bands):
            start = number * _BAND
            stop = start + len(band)
            rows = whole[start:stop, start:]
            rows.copy_(band)
            if summed._scale is not None:
                rows.mul_(summed._scale[start:stop, None]).mul_(summed._scale[start:])
            square = whole[start:stop, start:stop]
            square.copy_(square.triu() + square.triu(1).T)
            whole[stop:, start:stop] = whole[start:stop, stop:].T
        return whole

    def of(self, factor: Tensor | None = None, shifts: Mapping[float, Tensor] | None = None) -> Tensor:
        """Moments E[y y^T], float64, of the rows after the shift of their timestep and the division per channel.

        Args:
            factor: b in ``y = (x - z) / b``, ``[C]``; 1 if None.
            shifts: z by timestep, ``[C]`` each; 0 if None.

        Raises:
            CalibrationError: A timestep has no shift.
        """
        matrix, count = self.matrix, sum(self.counts.values())
        if shifts is not None:
            self._check_shifts(shifts)
            steps = list(self.sums)
            z = torch.stack([shifts[step].double() for step in steps]).to(matrix.device)
            sums = torch.stack([self.sums[step] for step in steps])
            counts = torch.tensor([self.counts[step] for step in steps], dtype=torch.float64, device=matrix.device)
            cross = sums.T @ z
            matrix -= cross
            matrix -= cross.T
            matrix += (z * counts[:, None]).T @ z
        matrix /= count
        if factor is not None:
            b = factor.double().to(matrix.device)
            matrix /= b
            matrix /= b[:, None]
        return matrix

    def rows(self, factor: Tensor | None = None, shifts: Mapping[float, Tensor] | None = None) -> Tensor | None:
        """Few rows R ``[n, C]``, float64, for which ``R.T @ R`` are the moments that :meth:`of` returns.

        Returns:
            The rows divided by the square root of their number; None if there were so many that the matrix is held.

        Raises:
            CalibrationError: A timestep has no shift.
        """
        if not self._rows:
            return None
        if shifts is not None:
            self._check_shifts(shifts)
        found = torch.cat(self._rows).double()
        if shifts is not None:
            moved = zip(found.split([len(rows) for rows in self._rows]), self._steps, strict=True)
            for part, step in moved:
                part.sub_(shifts[step].to(part))
        if factor is not None:
            found /= factor.to(found)
        return found.div_(len(found) ** 0.5)

    def _check_shifts(self, shifts: Mapping[float, Tensor]) -> None:
        missing = self.sums.keys() - shifts.keys()
        if missing:
            raise CalibrationError(f"no shift is known for the calibrated timestep {min(missing):g}")

    # Storage

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of everything that a file has to hold: the rows, or the matrix.

        Raises:
            CalibrationError: They are sealed.
        """
        self.check_open()
        if self._rows:
            yield "moment_rows", torch.cat(self._rows).cpu()
            yield "moment_calls", torch.tensor([len(rows) for rows in self._rows], dtype=torch.int64)
            yield "moment_call_timesteps", torch.tensor(self._steps, dtype=torch.float64)
        else:
            yield "moments", self._summed()._held.cpu()
        yield "moment_timesteps", torch.tensor(list(self.sums), dtype=torch.float64)
        yield "moment_sums", torch.stack([*self.sums.values()]).cpu()
        yield "moment_counts", torch.tensor([*self.counts.values()], dtype=torch.int64)

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], channels: int) -> SecondMoments:
        """Make moments of ``channels`` channels from the state that :meth:`tensors` gave.

        Raises:
            ValueError: Shapes or dtypes do not fit together, or a sum is not finite.
        """
        for name, dtype in _STORED.items():
            if name in tensors and tensors[name].dtype != dtype:
                raise ValueError(f"{name} is {tensors[name].dtype}, not {dtype}")
        sums, steps = tensors["moment_sums"], tensors["moment_timesteps"].tolist()
        counts = tensors["moment_counts"].tolist()
        if not sums.is_floating_point():
            raise ValueError(f"sums of second moments are {sums.dtype}")
        if not steps or sums.shape != (len(steps), channels):
            raise ValueError("second moments and their sums do not fit together")
        if len(set(steps)) != len(steps):
            raise ValueError("second moments list a timestep twice")
        if not (sums.isfinite().all() and min(counts, default=0) > 0):
            raise ValueError("a second moment is not finite, or was summed over nothing")
        found = cls(channels)
        if "moment_rows" in tensors:
            found._restore_rows(tensors, dict(zip(steps, counts, strict=True)))
        else:
            found._restore_matrix(tensors["moments"])
        found.sums = dict(zip(steps, sums.clone(), strict=True))
        found.counts = dict(zip(steps, counts, strict=True))
        return found

    def _restore_matrix(self, held: Tensor) -> None:
        # Compared before anything is allocated: sums of no timestep can state any number of channels.
        if held.shape != (_size(self.channels),):
            raise ValueError("second moments and their sums do not fit together")
        if held.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"second moments are {held.dtype}, not float32 or float64")
        if not held.isfinite().all():
            raise ValueError("a second moment is not finite, or was summed over nothing")
        self._rows, self._held = None, kept(held.clone())

    def _restore_rows(self, tensors: Mapping[str, Tensor], counts: Mapping[float, int]) -> None:
        rows, lengths = tensors["moment_rows"], tensors["moment_calls"].tolist()
        steps = tensors["moment_call_timesteps"].tolist()
        if rows.dim() != 2 or not rows.is_floating_point() or not rows.isfinite().all():
            raise ValueError(f"the rows of second moments are {list(rows.shape)} {rows.dtype}, or not finite")
        if min(lengths, default=0) <= 0 or sum(lengths) != len(rows) or rows.shape[1] != self.channels:
            raise ValueError("rows of second moments and their calls do not fit together")
        seen: dict[float, int] = {}
        for step, length in zip(steps, lengths, strict=True):
            seen[step] = seen.get(step, 0) + length
        if seen != counts:
            raise ValueError("rows of second moments are of other timesteps than their sums")
        if _too_many(rows.nbytes, self.channels):
            raise ValueError(f"{len(rows)} rows of second moments are more than are kept")
        self._rows, self._steps = [kept(part.clone()) for part in rows.split(lengths)], steps
        self._nbytes = rows.nbytes


_STORED = {
    "moment_timesteps": torch.float64,
    "moment_call_timesteps": torch.float64,
    "moment_counts": torch.int64,
    "moment_calls": torch.int64,
}
"""Dtypes of what describes second moments in a file."""


def _too_many(nbytes: int, channels: int) -> bool:
    """Whether rows of so many bytes are too large, so that the matrix is held in their place."""
    return nbytes > 4 * _size(channels) * _SHARE


def _shapes(channels: int) -> list[tuple[int, int]]:
    return [(min(_BAND, channels - start), channels - start) for start in range(0, channels, _BAND)]


def _size(channels: int) -> int:
    """Elements of the bands of a matrix."""
    return sum(rows * columns for rows, columns in _shapes(channels))


def _pieces(flat: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    parts = flat.split([rows * columns for rows, columns in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
