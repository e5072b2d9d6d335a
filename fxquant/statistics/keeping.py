"""Keeps statistics in files while they are recorded, of which only those are written again whose content has changed.

A call of a sampler has one timestep, so it changes one file with the extremes and sampled rows of all values at this
timestep, and the second moments of all values. A new file has a new name, and what it replaces is removed only when the
index of the new files is safe. So what a killed process leaves is complete.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxquant.disk.finished_work import FinishedWork, Part, digest_of_tensors
from fxquant.statistics.channels import ChannelStatistics
from fxquant.statistics.collection import Statistics
from fxquant.statistics.entry import Entry
from fxquant.statistics.moments import SecondMoments

Index = dict[str, Any]
"""Names of files, and what they hold, as JSON values."""

_PARTS = ("minimum", "maximum", "rows", "priorities")


class KeptStatistics:
    """The files of one recording.

    Args:
        work: Where they are kept.
    """

    def __init__(self, work: FinishedWork) -> None:
        self.work = work
        self._number = 0  # Files that were written so far; a part of their names.
        self._rows: dict[float, tuple[str, int]] = {}  # By timestep: the file, and the rows that were seen.
        self._moments: dict[str, tuple[str, int]] = {}  # By key: the file, and the rows that were added.

    def save(self, statistics: Statistics, made_from: Mapping[str, str]) -> Index:
        """Write what has changed.

        Args:
            statistics: What was recorded so far.
            made_from: As in :meth:`FinishedWork.part`.

        Returns:
            What :meth:`load` needs to find everything.
        """
        for moment in statistics.timesteps.tolist():
            held = {key: one._entries[moment] for key, one in statistics.items() if moment in one._entries}
            seen = sum(entry.count for entry in held.values())
            if moment not in self._rows or self._rows[moment][1] != seen:
                name = self._new_name("timestep")
                part = _part_of_entries(held)
                self.work.save(name, made_from, part.tensors, part.data)
                self._rows[moment] = name, seen
        for key, one in statistics.items():
            if one.moments is None:
                continue
            added = sum(one.moments.counts.values())
            if key not in self._moments or self._moments[key][1] != added:
                name = self._new_name("moments")
                self.work.save(name, made_from, dict(one.moments.tensors()), str(one.moments.device))
                self._moments[key] = name, added
        return {
            "number": self._number,
            "keys": [[key, one.channels, sorted(one.seeds)] for key, one in statistics.items()],
            "rows": [[moment, *found] for moment, found in self._rows.items()],
            "moments": [[key, *found] for key, found in self._moments.items()],
        }

    @torch.no_grad()
    def load(self, index: Index, statistics: Statistics, made_from: Mapping[str, str]) -> bool:
        """Put back what was recorded, in place of what the statistics hold.

        Returns:
            False if a file cannot be used, of which a warning tells; then the statistics are unchanged.
        """
        with torch.inference_mode(False):  # Recording updates these tensors in place.
            found: dict[str, ChannelStatistics] = {}
            for key, channels, seeds in index["keys"]:
                found[key] = statistics._new(key)
                found[key].channels, found[key].seeds = channels, frozenset(seeds)
            for moment, name, seen in index["rows"]:
                entries = self.work.load(name, made_from, lambda part: _entries_of_part(part, found))
                if entries is None:
                    return False
                if sum(entry.count for _, entry in entries) != seen:
                    return self._of_another_moment(name)
                for key, entry in entries:
                    found[key]._entries[moment] = entry
            for key, name, added in index["moments"]:
                channels = found[key].channels
                moments = self.work.load(name, made_from, functools.partial(_moments_of_part, channels=channels))
                if moments is None:
                    return False
                if sum(moments.counts.values()) != added:
                    return self._of_another_moment(name)
                found[key].moments = moments
        statistics._by_key = found
        self._number = index["number"]
        self._rows = {moment: (name, seen) for moment, name, seen in index["rows"]}
        self._moments = {key: (name, added) for key, name, added in index["moments"]}
        return True

    @staticmethod
    def check(index: Index) -> None:
        """Refuse what is not an index.

        Raises:
            ValueError: An entry is missing, has another type, or is there twice.
        """
        keys = [key for key, channels, seeds in index["keys"] if _are(int, channels, *seeds) and channels >= 0]
        known = set(keys)
        rows = [moment for moment, name, seen in index["rows"] if _are(str, name) and _are(int, seen)]
        moments = [key for key, name, added in index["moments"] if _are(str, name) and _are(int, added)]
        counts = len(index["keys"]), len(index["rows"]), len(index["moments"])
        good = counts == (len(keys), len(rows), len(moments)) and known.issuperset(moments)
        if not (good and _are(int, index["number"]) and all(type(moment) in (int, float) for moment in rows)):
            raise ValueError("it is not an index of statistics")
        names = KeptStatistics.files(index)
        if not all(len(set(listed)) == len(listed) for listed in (keys, rows, moments, names)):
            raise ValueError("it is an index that lists something twice")

    @staticmethod
    def files(index: Index) -> list[str]:
        """The names of all parts of an index."""
        return [name for kind in ("rows", "moments") for _, name, _ in index[kind]]

    def remove_replaced(self, old: Index, new: Index) -> None:
        """Remove the files of an index that another one no longer needs."""
        for name in set(self.files(old)) - set(self.files(new)):
            self.work.remove(name)

    @staticmethod
    def digest(statistics: Statistics) -> str:
        """A digest of everything that recording depends on: options, and what was recorded before."""
        options = statistics.num_rows, statistics.seed, statistics.calls.most, statistics.calls.seen
        found = hashlib.sha256(repr(options).encode())
        for key, one in statistics.items():
            found.update(f"{key}{sorted(one.seeds)}".encode())
            found.update(digest_of_tensors(one._tensors()).encode())
        return found.hexdigest()

    def _of_another_moment(self, name: str) -> bool:
        """Warn of a file that does not belong to the others, as if only some files of a folder were copied back."""
        self.work.warn(f"{self.work.path(name)} holds other calls than the files next to it")
        return False

    def _new_name(self, kind: str) -> str:
        self._number += 1
        return f"{kind}-{self._number:06}"


def _part_of_entries(held: Mapping[str, Entry]) -> Part:
    """Values with the same number of channels are in one tensor, because a file with few tensors is fast to write."""
    groups: dict[int, list[str]] = {}
    for key, entry in held.items():
        groups.setdefault(len(entry.minimum), []).append(key)
    tensors = {
        f"{channels}.{part}": torch.stack([_as_tensor(getattr(held[key], part)) for key in keys])
        for channels, keys in groups.items()
        for part in _PARTS
    }
    return Part(tensors, [[channels, [[key, held[key].count] for key in keys]] for channels, keys in groups.items()])


def _entries_of_part(part: Part, known: Mapping[str, ChannelStatistics]) -> Sequence[tuple[str, Entry]]:
    """The entries of a part, by key.

    Raises:
        ValueError: A tensor has another shape or dtype than the statistics of its key, or something is listed twice.
        KeyError: A key is unknown, or a tensor is missing.
    """
    found = []
    # First, so that no long list costs time.
    for listed in ([channels for channels, _ in part.data], [key for _, keys in part.data for key, _ in keys]):
        if len(set(listed)) != len(listed):
            raise ValueError("it lists the same statistics twice")
    for channels, keys in part.data:
        held = [part.tensors[f"{channels}.{name}"] for name in _PARTS]
        for number, (key, count) in enumerate(keys):
            own, slots = known[key].channels, known[key].rows_per_timestep
            shapes = [tuple(tensor.shape[1:]) for tensor in held]
            dtypes = [tensor.dtype for tensor in held]
            if shapes != [(own,), (own,), (slots, own), (slots,)] or dtypes != [*[torch.float32] * 3, torch.float64]:
                raise ValueError(f"its tensors {shapes} {dtypes} are not the statistics of {own} channels")
            if not _are(int, count) or count < 0:
                raise ValueError(f"{key} has seen {count!r} rows")
            low, high, rows, priorities = (tensor[number].clone() for tensor in held)
            found.append((key, Entry(low, high, rows, priorities.numpy(), count)))
    return found


def _moments_of_part(part: Part, channels: int) -> SecondMoments:
    device = torch.device(part.data)
    if device.type == "meta":
        raise ValueError("its second moments are on a device without values")
    return SecondMoments.restore(part.tensors, channels).to(device)


def _are(kind: type, *values: Any) -> bool:
    return all(type(value) is kind for value in values)


def _as_tensor(values: Any) -> Tensor:
    return values if isinstance(values, Tensor) else torch.from_numpy(values)
