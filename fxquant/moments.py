"""Second moments of observed values: how their channels go together, for rounding that weighs errors by it.

A matrix of all pairs of channels is as large as a weight and costs as much to update as a layer to run, so only what a
recipe asks for is recorded, and of each call at most so many rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fxquant.errors import CalibrationError

ROWS_PER_CALL = 1024
"""The most rows of one call that enter; the others would cost much and tell little more."""


class SecondMoments:
    """Sums of x x^T over sampled rows x ``[C]`` of one value, with the sums of x at each timestep.

    Attributes:
        matrix: ``[C, C]`` float32, on the device of the values.
        sums: By timestep the sum of the rows, float64 ``[C]``.
        counts: By timestep the number of rows.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self.matrix = torch.zeros(channels, channels, device=device)
        self.sums: dict[float, Tensor] = {}
        self.counts: dict[float, int] = {}

    def add(self, rows: Tensor, timestep: float) -> None:
        """Take in rows ``[n, C]`` seen at one timestep."""
        rows = rows.to(torch.float32)
        self.matrix.addmm_(rows.T, rows)
        total = rows.sum(dim=0, dtype=torch.float64)
        self.sums[timestep] = self.sums[timestep] + total if timestep in self.sums else total
        self.counts[timestep] = self.counts.get(timestep, 0) + len(rows)

    def merge(self, other: SecondMoments) -> None:
        """Take in what another run saw."""
        self.matrix += other.matrix.to(self.matrix.device)
        for timestep, theirs in other.sums.items():
            total = theirs.to(self.matrix.device)
            self.sums[timestep] = self.sums[timestep] + total if timestep in self.sums else total.clone()
            self.counts[timestep] = self.counts.get(timestep, 0) + other.counts[timestep]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 4 * self.matrix.numel() + 8 * len(self.sums) * len(self.matrix)

    def of(self, factor: Tensor | None = None, shifts: Mapping[float, Tensor] | None = None) -> Tensor:
        """Moments of the rows after each was shifted by its timestep and divided per channel: E[y y^T], float64.

        Args:
            factor: b in ``y = (x - z) / b``, ``[C]``; 1 if None.
            shifts: z by timestep, ``[C]`` each; 0 if None.

        Raises:
            CalibrationError: A timestep has no shift.
        """
        matrix, count = self.matrix.double(), sum(self.counts.values())
        if shifts is not None:
            missing = self.sums.keys() - shifts.keys()
            if missing:
                raise CalibrationError(f"no shift is known for the calibrated timestep {min(missing):g}")
            steps = list(self.sums)
            z = torch.stack([shifts[step].double() for step in steps]).to(matrix.device)
            sums = torch.stack([self.sums[step] for step in steps])
            counts = torch.tensor([self.counts[step] for step in steps], dtype=torch.float64, device=matrix.device)
            cross = sums.T @ z
            matrix = matrix - cross - cross.T + (z * counts[:, None]).T @ z
        matrix /= count
        if factor is not None:
            b = factor.double().to(matrix.device)
            matrix /= b
            matrix /= b[:, None]
        return matrix

    # Storage

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of all that a file has to hold."""
        yield "moments", self.matrix.cpu()
        yield "moment_timesteps", torch.tensor(list(self.sums), dtype=torch.float64)
        yield "moment_sums", torch.stack([*self.sums.values()]).cpu()
        yield "moment_counts", torch.tensor([*self.counts.values()], dtype=torch.int64)

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor]) -> SecondMoments:
        """Take the state that :meth:`tensors` gave.

        Raises:
            ValueError: Shapes do not fit together.
        """
        matrix, sums = tensors["moments"], tensors["moment_sums"]
        steps, counts = tensors["moment_timesteps"].tolist(), tensors["moment_counts"].tolist()
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or sums.shape != (len(steps), len(matrix)):
            raise ValueError("second moments and their sums do not fit together")
        found = cls(0)
        found.matrix = matrix.clone()
        found.sums = dict(zip(steps, sums.clone(), strict=True))
        found.counts = dict(zip(steps, counts, strict=True))
        return found
