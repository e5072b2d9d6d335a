"""Statistics of all values that calibration observed, by key, and the file that they are saved in.

An ``fxquant::observe(x, timestep, key, axis)`` node passes each observed value to :meth:`Statistics.record`. The
statistics contain nothing about how the values will be quantized. They are kept per timestep as they come; other code
decides which timesteps later share a bin, a scale or a shift. :mod:`fxquant.statistics.channels` describes what is kept
for each key and timestep.

Memory: all observed linears of DiT-XL/2 at 50 timesteps and the default number of rows take 0.67 GB. Memory grows with
the number of *different* timesteps, so calibrate on the sampler's own schedule rather than on random continuous times.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fxquant.errors import CalibrationError, ConfigurationError, shortened
from fxquant.numerics.weights import QuantizedWeight
from fxquant.statistics.channels import ChannelStatistics
from fxquant.statistics.file import read, write
from fxquant.statistics.kept_calls import KeptCalls, Run
from fxquant.statistics.moments import SecondMoments
from fxquant.statistics.table import ObservedRow, rows_of, summary_of, text_of


class _NeverReachedError(CalibrationError, KeyError):
    """It is also a ``KeyError``, because the mixin methods of ``Mapping`` (``get``, ``in``) catch this type."""

    __str__ = Exception.__str__  # KeyError would print the message as a quoted literal


class SharedRoundings(Protocol):
    """Weights that several conversions from the same statistics share: :class:`fxquant.planning.roundings.Roundings`.

    Attributes:
        found: The weights, by everything that they depend on.
    """

    found: dict[Hashable, QuantizedWeight]

    @property
    def wanted(self) -> Callable[[Any, str], Sequence[Any]]:
        """Gives the precisions in which a layer will be rounded, from the plan and its name."""


class MomentsOnDemand(Protocol):
    """Records second moments after calibration: :class:`fxquant.calibration.later_moments.LaterMoments`."""

    def moments(self, key: str) -> SecondMoments | None:
        """The moments of a key; None if they are not wanted."""

    def forget(self, key: str) -> None:
        """Drop the moments of a key."""


class Statistics(Mapping[str, ChannelStatistics]):
    """All that one calibration run recorded: a mapping from the key of an observed value to its statistics.

    Args:
        num_rows: rows (tokens) sampled for each key and timestep; None for the number that
            :func:`~fxquant.statistics.channels.rows_to_sample` gives.
        seed: seed of the row samples. The same model, data and seed give identical statistics.
        transient: whether the statistics are not needed afterwards, so that large parts may be dropped after use.
        keep_calls: the most calls of the model whose inputs are kept, 0 for none. They are spread evenly over the
            timesteps, with at most 16 samples each. :func:`fxquant.attribute` runs them, and later conversions that
            learn from calls.

    Raises:
        ConfigurationError: ``num_rows`` is not positive, or ``keep_calls`` is negative.
    """

    def __init__(
        self, *, num_rows: int | None = None, seed: int = 0, transient: bool = False, keep_calls: int = 0
    ) -> None:
        if num_rows is not None and num_rows < 1:
            raise ConfigurationError(f"statistics need at least one sampled row per timestep, got num_rows={num_rows}")
        if keep_calls < 0:
            raise ConfigurationError(f"keep_calls={keep_calls} is not a number of calls; give 0 for none")
        self.calls = KeptCalls(keep_calls, seed)
        """The kinds of call that calibration saw, and the calls that are kept."""
        self.run: Run | None = None
        """What the statistics were recorded from; None as long as nothing was, and for files of earlier versions."""
        self.num_rows = num_rows
        self.seed = seed
        self.transient = transient
        self.wants_moments: Callable[[str], bool] = lambda key: False
        """Whether to record second moments ``[C, C]`` for a key; calibration sets it to what the recipe needs."""
        self.later: MomentsOnDemand | None = None
        """Records second moments when they are asked for, in place of calibration; never saved."""
        self.combined: dict[str, list[str]] = {}
        """The keys of values whose statistics were combined, by the key of the combined ones."""
        self.roundings: SharedRoundings | None = None
        """Weights rounded by these statistics, while several conversions share them; never saved."""
        self._by_key: dict[str, ChannelStatistics] = {}

    def for_rank(self, rank: int) -> Statistics:
        """Empty statistics with the same options, for one of several processes that record at the same time.

        Args:
            rank: Number of the process. Each draws its rows with another seed; the first has the seed of these
                statistics, if they are empty.
        """
        seed, before = self.seed, self.calls.seen
        if rank or len(self) or before:
            text = f"{seed}:{rank}:{before}".encode()
            seed = int.from_bytes(hashlib.blake2b(text, digest_size=7).digest())
        return Statistics(num_rows=self.num_rows, seed=seed, transient=self.transient, keep_calls=self.calls.most)

    def __getitem__(self, key: str) -> ChannelStatistics:
        """Statistics of one observed value.

        Raises:
            CalibrationError: nothing was recorded under ``key``.
        """
        try:
            return self._by_key[key]
        except KeyError:
            raise _NeverReachedError(
                f"calibration never reached layer {shortened(key)!r} ({len(self._by_key)} others were recorded). "
                "Calibrate with calls that use it: the same optional inputs, guidance and schedule as at run time. Or "
                "leave the layer out of the recipe."
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_key)

    def __len__(self) -> int:
        return len(self._by_key)

    def __repr__(self) -> str:
        return (
            f"Statistics(keys={len(self)}, timesteps={len(self.timesteps)}, num_rows={self.num_rows}, "
            f"calls={len(self.calls)}, nbytes={self.nbytes})"
        )

    def _new(self, key: str) -> ChannelStatistics:
        return ChannelStatistics(key, num_rows=self.num_rows, seed=self.seed)

    def record(self, key: str, x: Tensor, timestep: Tensor, axis: int = -1) -> None:
        """Record one observed value; see :meth:`ChannelStatistics.record`.

        Raises:
            CalibrationError: the shape of ``x`` or of ``timestep`` does not fit; nothing was recorded.
            NonFiniteError: ``x`` or ``timestep`` holds NaN or infinity; nothing was recorded.
        """
        statistics = self._by_key.get(key) or self._new(key)
        statistics.record(x, timestep, axis, moments=self.wants_moments(key))
        if len(statistics):  # an empty batch leaves the layer unreached
            self._by_key[key] = statistics

    def merge(self, other: Statistics) -> None:
        """Merge another run over other data; see :meth:`ChannelStatistics.merge`. ``other`` does not change.

        Raises:
            ConfigurationError: the runs sample different numbers of rows, or share a seed at a common timestep.
            CalibrationError: the channels of a key or the models differ, or the statistics of one are sealed.
        """
        if self.run is not None and other.run is not None:
            self.run.check_same(other.run, "the other run")
            self.run.check_prepared(other.run.prepared, "the other run")
        merged = {key: self._by_key.get(key) or self._new(key) for key in other}
        for key, ours in merged.items():  # check all before merging any, so that an error leaves this run unchanged
            ours.check_mergeable(other[key])
        for key, ours in merged.items():
            ours.merge(other[key])
        self._by_key.update(merged)
        self.run = self.run or other.run
        self.calls.merge(other.calls)

    def combine(self, keys: Iterable[str], name: str) -> None:
        """Combine the statistics of several recorded values under a separate key.

        Args:
            keys: keys of the values, which have the same channels; their own statistics stay.
            name: key of the combined statistics; replaces what was there before.

        Raises:
            CalibrationError: nothing was recorded under a key.
        """
        together = self._new(name)
        self.combined[name] = keys = list(keys)
        for key in keys:  # Each value drew its rows with its own random numbers, so the samples compete fairly.
            together._take(self[key])
        self._by_key[name] = together

    def seal(self) -> None:
        """Halve the memory of the second moments; nothing can be recorded, merged or saved after that."""
        for statistics in self._by_key.values():
            if statistics.moments is not None:
                statistics.moments.seal()

    def moments_of(self, key: str) -> SecondMoments | None:
        """Second moments of one observed value; None if they were not recorded.

        Raises:
            CalibrationError: nothing was recorded under ``key``.
        """
        found = self[key].moments
        return self.later.moments(key) if found is None and self.later is not None else found

    def drop_moments(self, key: str) -> None:
        """Free the second moments of one observed value."""
        self[key].moments = None
        if self.later is not None:
            self.later.forget(key)

    @property
    def timesteps(self) -> Tensor:
        """Timesteps that any key saw, ascending: ``[T]`` float64."""
        moments: set[float] = set()
        for statistics in self._by_key.values():
            moments.update(statistics._entries)
        return torch.tensor(sorted(moments), dtype=torch.float64)

    @property
    def nbytes(self) -> int:
        """Bytes held by all keys and kept calls together."""
        return sum(statistics.nbytes for statistics in self._by_key.values()) + self.calls.nbytes

    def rows(self, layer: str | None = None) -> list[ObservedRow]:
        """What was recorded, one row per observed value; for one value, one row for all timesteps and one for each.

        Raises:
            UnknownNameError: nothing was recorded under the key ``layer``; the message names similar keys.
        """
        return rows_of(self, layer)

    def table(self, layer: str | None = None) -> str:
        """The same as :meth:`rows`, as text of at most 140 columns.

        ``median|x|`` and ``max|x|`` are the median and the largest of the channels' maximum magnitudes; a large ratio
        shows outlier channels. ``moves`` is by what factor the maximum changes over the timesteps.
        """
        summary = summary_of(self, len(self.timesteps), len(self.calls), self.nbytes)
        return text_of(self.rows(layer), summary)

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file, from which recording and merging can continue.

        The file is written completely or not at all. It holds no code and no weights.

        Raises:
            WriteError: the file cannot be written.
            CalibrationError: second moments were reduced to what rounding needs.
        """
        write(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read what :meth:`save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, not a file of statistics, or has a newer format.
        """
        return read(path)

    def _put_back(self, key: str, seeds: Iterable[int], tensors: Mapping[str, Tensor]) -> None:
        """Restore the statistics of one key from a file.

        Raises:
            KeyError: a tensor is missing.
            ValueError: the tensors do not fit together.
        """
        statistics = self._new(key)
        statistics.seeds = frozenset(seeds)
        statistics._restore(tensors)
        self._by_key[key] = statistics
