"""Which neighbouring timesteps form a group: contiguous clustering of one vector per timestep."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fxquant.errors import CalibrationError, ConfigurationError

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Merge:
    """One step of the dendrogram.

    Attributes:
        left: Position of the first timestep of the earlier of the two merged groups.
        right: Position of the first timestep of the later group.
        distance: Squared distance of the means of the two groups.
    """

    left: int
    right: int
    distance: float


def check_groups(groups: int, timesteps: int) -> int:
    """The number of groups: ``groups``, or for 0 a tenth of the timesteps, rounded up.

    Raises:
        CalibrationError: There is only one timestep.
        ConfigurationError: There are fewer timesteps than groups.
    """
    if timesteps < 2:
        raise CalibrationError(
            "calibration saw one timestep only, which is too few to group timesteps; calibrate with the whole schedule "
            "that the model will be used with"
        )
    if groups > timesteps:
        raise ConfigurationError(
            f"{groups} groups of timesteps were requested, but calibration saw {timesteps} timesteps; request at most "
            "as many groups"
        )
    return groups or -(-timesteps // 10)


def merge_neighbours(vectors: Floats) -> list[Merge]:
    """The whole dendrogram: each step merges the two adjacent groups with the closest means.

    HTG (arXiv 2503.06930). The first T - G merges leave G groups.

    Args:
        vectors: One vector per timestep, in order: ``[T, C]``.
    """
    starts, means, sizes = list(range(len(vectors))), list(vectors), [1] * len(vectors)
    distances = [float(d) for d in np.square(np.diff(vectors, axis=0)).sum(axis=1)]
    merges = []
    while distances:
        i = int(np.argmin(distances))
        merges.append(Merge(starts[i], starts[i + 1], distances[i]))
        total = sizes[i] + sizes[i + 1]
        means[i] = (means[i] * sizes[i] + means[i + 1] * sizes[i + 1]) / total
        sizes[i] = total
        del starts[i + 1], means[i + 1], sizes[i + 1], distances[i]
        for j in (i - 1, i):
            if 0 <= j < len(distances):
                distances[j] = float(np.square(means[j] - means[j + 1]).sum())
    return merges


def cut(merges: list[Merge], timesteps: int, groups: int) -> list[int]:
    """Where groups start after the first merges of a dendrogram: ascending positions, beginning with 0."""
    gone = {merge.right for merge in merges[: timesteps - groups]}
    return [start for start in range(timesteps) if start not in gone]


def best_segments(vectors: Floats, groups: int) -> list[int]:
    """Where groups start so that the sum of squared distances of all vectors to their group's mean is minimal.

    Exact, by dynamic programming (W. D. Fisher, "On grouping for maximum homogeneity", 1958), in O(G T^2).

    Args:
        vectors: One vector per timestep, in order: ``[T, C]``.
        groups: Number of groups, at most T.
    """
    count = len(vectors)
    costs = _segment_costs(vectors)
    best, choice = costs[0].copy(), np.zeros((groups, count + 1), dtype=np.int64)
    for group in range(1, groups):
        candidates = best[:, None] + costs  # [start, stop]: the earlier groups end at start.
        candidates[:group] = np.inf
        choice[group] = candidates.argmin(axis=0)
        best = candidates.min(axis=0)
    starts, stop = [], count
    for group in range(groups - 1, -1, -1):
        stop = int(choice[group, stop])
        starts.append(stop)
    return starts[::-1]


def within(vectors: Floats, starts: list[int]) -> float:
    """Sum of the squared distances of all vectors to their group's mean."""
    pieces = np.split(vectors, starts[1:])
    return float(sum(np.square(piece - piece.mean(axis=0)).sum() for piece in pieces))


def _segment_costs(vectors: Floats) -> Floats:
    """Cost of each segment, ``[start, stop]``; infinite for empty segments."""
    centred = vectors - vectors.mean(axis=0)
    gram = np.zeros((len(vectors) + 1, len(vectors) + 1))
    gram[1:, 1:] = (centred @ centred.T).cumsum(axis=0).cumsum(axis=1)
    squares = np.concatenate([[0.0], np.square(centred).sum(axis=1).cumsum()])
    diagonal = gram.diagonal()
    size = np.arange(len(gram))[None, :] - np.arange(len(gram))[:, None]
    total = diagonal[None, :] - gram - gram.T + diagonal[:, None]  # |sum of the segment|^2
    with np.errstate(divide="ignore", invalid="ignore"):
        costs = squares[None, :] - squares[:, None] - total / size
    return np.where(size > 0, np.maximum(costs, 0.0), np.inf)
