"""Second moments of observed values: how their channels go together, for rounding that weighs errors by it.

A matrix of all pairs of channels is as large as a weight and costs as much to update as a layer to run, so only what a
recipe asks for is recorded, and of each call at most so many rows. As it is symmetric, the upper triangle is kept, in
bands of rows, which take little more than half of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fxquant.errors import CalibrationError

ROWS_PER_CALL = 1024
"""The most rows of one call that enter; the others would cost much and tell little more."""

_BAND = 256  # Rows of the matrix that are kept and updated together.


class SecondMoments:
    """Sums of x x^T over sampled rows x ``[C]`` of one value, with the sums of x at each timestep.

    Attributes:
        channels: C.
        bands: Rows of the upper triangle of the sums of x x^T: band i is ``[256, C - 256 i]`` float32, the last one
            lower, on the device of the values.
        scale: Once :meth:`seal` was called, the roots of the diagonal, float32 ``[C]``; the bands are float16 then, of
            correlations.
        sums: By timestep the sum of the rows, float64 ``[C]``.
        counts: By timestep the number of rows.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self.channels = channels
        starts = range(0, channels, _BAND)
        self.bands = [torch.zeros(min(_BAND, channels - i), channels - i, device=device) for i in starts]
        self.scale: Tensor | None = None
        self.sums: dict[float, Tensor] = {}
        self.counts: dict[float, int] = {}

    def add(self, rows: Tensor, timestep: float) -> None:
        """Take in rows ``[n, C]`` seen at one timestep."""
        assert self.scale is None, "sealed moments take nothing in"
        rows = rows.to(torch.float32)
        for number, band in enumerate(self.bands):
            right = rows[:, number * _BAND :]
            band.addmm_(right[:, : len(band)].T, right)
        total = rows.sum(dim=0, dtype=torch.float64)
        self.sums[timestep] = self.sums[timestep] + total if timestep in self.sums else total
        self.counts[timestep] = self.counts.get(timestep, 0) + len(rows)

    def merge(self, other: SecondMoments) -> None:
        """Take in what another run saw."""
        for ours, theirs in zip(self.bands, other.bands, strict=True):
            ours.add_(theirs.to(ours.device))
        for timestep, sums in other.sums.items():
            total = sums.to(self.bands[0].device)
            self.sums[timestep] = self.sums[timestep] + total if timestep in self.sums else total.clone()
            self.counts[timestep] = self.counts.get(timestep, 0) + other.counts[timestep]

    def seal(self) -> None:
        """Take half the room: from now on nothing can be added.

        Correlations, -1 to 1, are rounded to float16, by at most 2^-12 of the two channels' root mean squares: far less
        than what another sample of rows would change.
        """
        if self.scale is not None:
            return
        diagonal = torch.cat([band.diagonal() for band in self.bands])
        self.scale = diagonal.sqrt()
        inverse = torch.where(self.scale > 0, 1 / self.scale, 0.0)
        for number, band in enumerate(self.bands):
            start = number * _BAND
            band.mul_(inverse[start : start + len(band), None]).mul_(inverse[start:])
            self.bands[number] = band.to(torch.float16)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(band.nbytes for band in self.bands) + 8 * len(self.sums) * self.channels

    @property
    def matrix(self) -> Tensor:
        """The sums of x x^T, float64 ``[C, C]``, put together anew."""
        whole = torch.empty(self.channels, self.channels, dtype=torch.float64, device=self.bands[0].device)
        for number, band in enumerate(self.bands):
            start = number * _BAND
            stop = start + len(band)
            rows = whole[start:stop, start:]
            rows.copy_(band)
            if self.scale is not None:
                rows.mul_(self.scale[start:stop, None]).mul_(self.scale[start:])
            square = whole[start:stop, start:stop]
            square.copy_(square.triu() + square.triu(1).T)
            whole[stop:, start:stop] = whole[start:stop, stop:].T
        return whole

    def of(self, factor: Tensor | None = None, shifts: Mapping[float, Tensor] | None = None) -> Tensor:
        """Moments of the rows after each was shifted by its timestep and divided per channel: E[y y^T], float64.

        Args:
            factor: b in ``y = (x - z) / b``, ``[C]``; 1 if None.
            shifts: z by timestep, ``[C]`` each; 0 if None.

        Raises:
            CalibrationError: A timestep has no shift.
        """
        matrix, count = self.matrix, sum(self.counts.values())
        if shifts is not None:
            missing = self.sums.keys() - shifts.keys()
            if missing:
                raise CalibrationError(f"no shift is known for the calibrated timestep {min(missing):g}")
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

    # Storage

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of all that a file has to hold."""
        yield "moments", torch.cat([band.flatten() for band in self.bands]).cpu()
        yield "moment_timesteps", torch.tensor(list(self.sums), dtype=torch.float64)
        yield "moment_sums", torch.stack([*self.sums.values()]).cpu()
        yield "moment_counts", torch.tensor([*self.counts.values()], dtype=torch.int64)

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor]) -> SecondMoments:
        """Take the state that :meth:`tensors` gave.

        Raises:
            ValueError: Shapes do not fit together.
        """
        sums, steps = tensors["moment_sums"], tensors["moment_timesteps"].tolist()
        counts = tensors["moment_counts"].tolist()
        if sums.dim() != 2 or len(sums) != len(steps) or not sums.shape[1]:
            raise ValueError("second moments and their sums do not fit together")
        found = cls(sums.shape[1])
        pieces = _pieces(tensors["moments"], [band.shape for band in found.bands])
        found.bands = [piece.clone() for piece in pieces]
        found.sums = dict(zip(steps, sums.clone(), strict=True))
        found.counts = dict(zip(steps, counts, strict=True))
        return found


def _pieces(flat: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    sizes = [shape.numel() for shape in shapes]
    if flat.shape != (sum(sizes),):
        raise ValueError("second moments and their sums do not fit together")
    return [piece.reshape(shape) for piece, shape in zip(flat.split(sizes), shapes, strict=True)]
