"""One observed value at one timestep: extremes, a count and a sample of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fxquant.memory.bound import current, zeros

EMPTY = np.inf  # the priority of a slot that holds no row: every row has a smaller one


@dataclass(slots=True)
class Entry:
    """One key at one timestep. The slots of the sample are in no particular order.

    Attributes:
        minimum: ``[C]`` float32.
        maximum: ``[C]`` float32.
        rows: ``[R, C]`` float32; a slot whose priority is infinite holds no row.
        priorities: ``[R]`` float64.
        count: rows seen.
    """

    minimum: Tensor
    maximum: Tensor
    rows: Tensor
    priorities: npt.NDArray[np.float64]
    count: int = 0

    @classmethod
    def empty(cls, channels: int, num_rows: int) -> Entry:
        """An entry that has seen no row."""
        if current() is None:
            minimum, maximum = torch.empty(channels, dtype=torch.float32), torch.empty(channels, dtype=torch.float32)
            # Made by numpy, which requests zeroed pages; torch would fill the pages in a parallel region.
            rows = torch.from_numpy(np.zeros((num_rows, channels), dtype=np.float32))
        else:  # In one piece, which is large enough for a file.
            held = zeros((num_rows + 2, channels), torch.float32)
            minimum, maximum, rows = held[0], held[1], held[2:]
        entry = cls(minimum, maximum, rows, np.full(num_rows, EMPTY))
        entry.minimum.fill_(torch.inf)
        entry.maximum.fill_(-torch.inf)
        return entry

    def widen(self, minimum: Tensor, maximum: Tensor, count: int) -> None:
        """Include ``count`` further rows with these extremes ``[C]``."""
        torch.minimum(self.minimum, minimum, out=self.minimum)
        torch.maximum(self.maximum, maximum, out=self.maximum)
        self.count += count

    def compete(
        self, priorities: npt.NDArray[np.float64], fetch: Callable[[npt.NDArray[np.intp]], Iterable[Tensor]]
    ) -> None:
        """Keep the rows with the R smallest priorities among the present rows and new ones.

        Args:
            priorities: priorities of the new rows, ``[n]``.
            fetch: takes the positions ``[m]`` of the new rows to keep, and returns these rows, m times ``[C]``. It is
                not called if no new row is kept, which soon becomes the usual case.
        """
        size = len(self.priorities)
        kept = np.argsort(np.concatenate((self.priorities, priorities)), kind="stable")[:size]
        winners = kept[kept >= size] - size
        if not len(winners):
            return
        lost = np.ones(size, dtype=bool)
        lost[kept[kept < size]] = False
        slots = np.flatnonzero(lost)
        # One by one: an indexed copy of several wide rows would be a parallel region.
        for slot, row in zip(slots, fetch(winners), strict=True):
            self.rows[slot].copy_(row)
        self.priorities[slots] = priorities[winners]

    def absorb(self, other: Entry) -> None:
        """Include everything that another entry saw; ``other`` does not change."""
        self.widen(other.minimum, other.maximum, other.count)
        self.compete(other.priorities, lambda winners: other.rows[torch.from_numpy(winners)])

    def sample(self) -> Tensor:
        """The sampled rows ``[n, C]``, n <= R, in order of priority, whatever order they were recorded in."""
        order = np.argsort(self.priorities, kind="stable")
        return self.rows[torch.from_numpy(order[: np.count_nonzero(np.isfinite(self.priorities))])]


def check_values(tensors: Mapping[str, Tensor]) -> None:
    """Check the tensors of one key in a file for values that no recording produces.

    Raises:
        ValueError: the message says which.
    """
    steps, low, high = tensors["timesteps"], tensors["minimum"], tensors["maximum"]
    held = tensors["priorities"].isfinite()
    wrong = {
        "there is no timestep or no channel": not low.numel(),
        "timesteps are not ascending numbers": not (steps.isfinite().all() and (steps.diff() > 0).all()),
        "a count is not positive": bool((tensors["count"] < 1).any()),
        "a minimum or maximum is not finite": not (low.isfinite().all() and high.isfinite().all()),
        "a minimum is above its maximum": bool((low > high).any()),
        "a priority is negative or not a number": not bool((tensors["priorities"] >= 0).all()),
        "a sampled row is not finite": not tensors["rows"][held].isfinite().all(),
    }
    found = next((reason for reason, present in wrong.items() if present), None)
    if found is not None:
        raise ValueError(found)
