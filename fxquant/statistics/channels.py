"""Statistics of one observed value: for each timestep and channel the extremes, and a sample of rows.

For each timestep there are exact per-channel extremes, a row count, and a small uniform sample of rows (tokens) from
which quantiles and mean squared errors are estimated.

Samples can be merged because every row has a random priority, independent and exponentially distributed, and the sample
consists of the rows with the smallest priorities. So the sample is a function of the *set* of rows, and neither their
order nor their split into calls and runs matters. Only the priorities of sampled rows are ever drawn: the k smallest of
n exponentials are cumulative sums of ``E_j / (n - j)`` with independent unit exponentials ``E_j`` (Rényi, "On the
theory of order statistics", 1953), and the rows that they belong to are a random k-permutation.

Memory: ``T * (4 * C * (R + 2) + 8 * (R + 2))`` bytes per value, for T timesteps, C channels and R rows, without second
moments.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fxquant.errors import CalibrationError, ConfigurationError, NonFiniteError
from fxquant.statistics.entry import Entry, check_values
from fxquant.statistics.moments import ROWS_PER_CALL, SecondMoments

_FEWEST_ROWS = 8
_MOST_ROWS = 1024
_SAMPLED_VALUES = 16_384  # Enough for the tails of a distribution over all timesteps, few enough to stay below 1 GB.


def rows_to_sample(channels: int) -> int:
    """Default number of rows kept for each key and timestep: about 16,384 values, 8 to 1,024 rows."""
    return max(_FEWEST_ROWS, min(_MOST_ROWS, _SAMPLED_VALUES // channels))


# The calling thread alone reduces a value on the CPU of up to this many elements (16 MiB of float32, about a
# millisecond). A parallel region waits until each of its threads is scheduled: many milliseconds if cores are shared.
_SERIAL_ELEMENTS = 1 << 22


class ChannelStatistics:
    """Per-channel, per-timestep statistics of one observed value, kept on the CPU in float32.

    All views are sorted by timestep and are fresh tensors: T timesteps, C channels, R = ``rows_per_timestep``.

    Args:
        key: name of the observed value; errors cite it, and its random stream depends on it.
        num_rows: rows (tokens) sampled at each timestep; None for the number that :func:`rows_to_sample` gives.
        seed: seed of the row sample. Runs that will be merged need different seeds if they share timesteps.

    Raises:
        ConfigurationError: ``num_rows`` is not positive.
    """

    def __init__(self, key: str, *, num_rows: int | None = None, seed: int = 0) -> None:
        if num_rows is not None and num_rows < 1:
            raise ConfigurationError(f"statistics need at least one sampled row per timestep, got num_rows={num_rows}")
        self.key = key
        self.num_rows = num_rows
        self.seed = seed
        self.seeds: frozenset[int] = frozenset()
        """Seeds that have picked rows, including those of merged runs."""
        self.channels = 0
        """C, or 0 as long as nothing was recorded."""
        self.moments: SecondMoments | None = None
        """Second moments of the channels, if :class:`~fxquant.statistics.collection.Statistics` records them."""
        self._entries: dict[float, Entry] = {}
        digest = hashlib.blake2b(f"{seed}\0{key}".encode(), digest_size=16).digest()
        self._philox_key = np.frombuffer(digest, dtype="<u8")

    def __repr__(self) -> str:
        return f"ChannelStatistics({self.key!r}, timesteps={len(self._entries)}, channels={self.channels})"

    def __len__(self) -> int:
        """Number of timesteps seen."""
        return len(self._entries)

    # Recording

    def record(self, x: Tensor, timestep: Tensor, axis: int = -1, moments: bool = False) -> None:
        """Record one value; each position along the other axes than the channel axis is one row.

        Args:
            x: ``[k * B, ...]`` of any real dtype on any device, with C channels along ``axis``.
            timestep: number (0-d) or ``[1]`` for all samples; ``[B]`` for one per sample, where each timestep covers k
                consecutive entries of ``x`` (frames folded into the batch: k frames of each of B videos); or ``[B, N]``
                for one per token of a value ``[B, N, ...]``. Rows that belong to several timesteps, such as rows with
                prompts of several samples, count at each of these timesteps, so extremes are never too narrow.
            axis: the channel axis of ``x``; not the leading axis.
            moments: whether to record :attr:`moments` too.

        Raises:
            CalibrationError: ``x`` has no such axis or another number of channels than before, or there is no timestep;
                nothing was recorded.
            NonFiniteError: ``x`` or ``timestep`` holds NaN or infinity; nothing was recorded.
        """
        # Buffers that are made under inference mode cannot be updated in place outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self._record(x, timestep, axis, moments)

    def _record(self, x: Tensor, timestep: Tensor, axis: int, moments: bool) -> None:
        if not (-x.dim() <= axis < x.dim()) or x.dim() < 2 or axis % x.dim() == 0:
            raise CalibrationError(
                f"cannot record {self.key!r}: a value of shape {list(x.shape)} has no channel axis {axis} "
                "after a leading batch axis"
            )
        # A view; only the sampled rows are ever copied.
        x = x.movedim(axis, -1)
        channels = x.shape[-1]
        if self.channels not in (0, channels):
            raise CalibrationError(
                f"cannot record {self.key!r}: it had {self.channels} channels before and now {channels}. "
                "One key is one layer input; give different values different keys."
            )
        if timestep.dim() > 1 and x.shape[: timestep.dim()] == timestep.shape and x.dim() > timestep.dim():
            x, timestep = x.flatten(0, timestep.dim() - 1), timestep.flatten()  # Each token is a sample of its own.
        groups = self._samples_by_timestep(timestep, x.shape)
        if x.numel() == 0:
            return
        bounds = self._bounds(x, list(groups.values()))
        for moment, (low, high) in zip(groups, bounds, strict=True):
            if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
                bad = int((~(torch.isfinite(low) & torch.isfinite(high))).sum())
                raise NonFiniteError(
                    f"{self.key!r} holds NaN or infinity in {bad} of {channels} channels at timestep {moment:g}. "
                    "Run calibration in a dtype in which the float model itself is finite (bfloat16 or float32)."
                )

        self.channels = channels
        self.seeds |= {self.seed}
        per_sample = x.shape[:-1].numel() // x.shape[0]
        for (moment, samples), (low, high) in zip(groups.items(), bounds, strict=True):
            entry = self._entries.get(moment)
            if entry is None:
                entry = self._entries[moment] = Entry.empty(channels, self.rows_per_timestep)
            n = len(samples) * per_sample
            stream = self._stream(moment, entry.count)
            if moments:
                self._add_moments(x, moment, samples, per_sample, entry.count, ROWS_PER_CALL // len(groups) or 1)
            entry.widen(low, high, n)
            self._sample(entry, stream, x, samples, per_sample)

    def _samples_by_timestep(self, timestep: Tensor, shape: torch.Size) -> dict[float, npt.NDArray[np.intp]]:
        """The positions along the leading axis of a value of ``shape`` that belong to each timestep.

        A position belongs to all timesteps that it may have if its timestep is unknown, or if it was computed from
        several tokens that have their own timesteps.
        """
        moments = timestep.detach().to("cpu", torch.float64).numpy() + 0.0  # -0.0 becomes 0.0
        if not moments.size:
            raise CalibrationError(
                f"cannot record {self.key!r}: the timestep has shape {list(timestep.shape)} and holds no number; pass "
                "the model one timestep per sample, or one for all"
            )
        if not np.isfinite(moments).all():
            raise NonFiniteError(f"cannot record {self.key!r}: its timestep {moments.flatten().tolist()} is not finite")
        distinct = np.unique(moments)
        samples = moments.shape[0] if moments.ndim else 1
        if len(distinct) == 1 or shape[0] % samples:
            return {float(moment): np.arange(shape[0]) for moment in distinct}
        by_sample = moments.reshape(samples, -1)
        each = np.repeat(np.arange(samples), shape[0] // samples)
        return {float(moment): np.flatnonzero((by_sample == moment).any(axis=1)[each]) for moment in distinct}

    @staticmethod
    def _bounds(x: Tensor, groups: list[npt.NDArray[np.intp]]) -> list[tuple[Tensor, Tensor]]:
        """Minimum and maximum ``[C]`` of each group of samples of ``x``, float32 on the CPU."""
        first = 0 if len(groups) == 1 else 1
        inner = tuple(range(first, x.dim() - 1))
        if not inner:  # torch reads an empty tuple of axes as all axes
            low, high = x, x
        elif x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and x.numel() <= _SERIAL_ELEMENTS:
            array = x.detach().numpy()
            low, high = torch.from_numpy(array.min(inner)), torch.from_numpy(array.max(inner))
        else:  # torch.aminmax is 10 to 20 times slower than these two along a leading axis
            low, high = x.amin(inner), x.amax(inner)
        low, high = torch.stack((low, high)).to("cpu", torch.float32)  # one transfer, not two
        if len(groups) == 1:
            return [(low, high)]
        lows, highs = low.numpy(), high.numpy()
        return [(torch.from_numpy(lows[at].min(0)), torch.from_numpy(highs[at].max(0))) for at in groups]

    def _add_moments(
        self, x: Tensor, moment: float, samples: npt.NDArray[np.intp], per_sample: int, seen: int, most: int
    ) -> None:
        """Add at most ``most`` rows of ``samples`` in ``x`` (channels last) to the second moments."""
        if self.moments is None:
            self.moments = SecondMoments(self.channels, x.device)
        n = len(samples) * per_sample
        rows = samples[np.arange(n) // per_sample] * per_sample + np.arange(n) % per_sample
        if n > most:
            rows = rows[self._stream(moment, seen, 1).choice(n, most, replace=False)]
        self.moments.add(x.reshape(-1, self.channels)[torch.from_numpy(rows).to(x.device)], moment)

    def _stream(self, moment: float, count: int, purpose: int = 0) -> np.random.Generator:
        """Random numbers that depend only on seed, key, timestep, the rows seen there so far, and ``purpose``.

        So a rerun draws the same numbers, whatever was recorded in between at other timesteps or keys.
        """
        where = int(np.float64(moment).view(np.uint64))
        counter = np.array([0, purpose, count, where], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=self._philox_key, counter=counter))

    @staticmethod
    def _sample(
        entry: Entry, stream: np.random.Generator, x: Tensor, samples: npt.NDArray[np.intp], per_sample: int
    ) -> None:
        """Let the rows of ``samples`` in ``x`` (channels last, ``per_sample`` rows each) compete for slots."""
        n = len(samples) * per_sample
        k = min(n, len(entry.priorities))
        # The k smallest of n exponential priorities in ascending order, without drawing the other n - k.
        priorities = np.cumsum(stream.standard_exponential(k) / np.arange(n, n - k, -1))
        picked = stream.choice(n, k, replace=False)

        def fetch(winners: npt.NDArray[np.intp]) -> Iterable[Tensor]:
            rows = picked[winners]
            flat = samples[rows // per_sample] * per_sample + rows % per_sample
            index = np.unravel_index(flat, x.shape[:-1])
            if x.device.type == "cpu":
                return (x[tuple(position)] for position in zip(*index, strict=True))
            return x[tuple(torch.from_numpy(i).to(x.device) for i in index)].cpu()  # one transfer

        entry.compete(priorities, fetch)

    # Merging

    def merge(self, other: ChannelStatistics) -> None:
        """Merge another run over other data, as if this run had seen the data of both.

        Extremes and counts are exactly those of one run; the sample has the same distribution. Merging is commutative
        and associative. ``other`` does not change.

        Raises:
            ConfigurationError: see :meth:`check_mergeable`.
            CalibrationError: see :meth:`check_mergeable`.
        """
        self.check_mergeable(other)
        self._take(other)

    def _take(self, other: ChannelStatistics) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.channels = self.channels or other.channels
            self.seeds |= other.seeds
            for moment, theirs in other._entries.items():
                ours = self._entries.get(moment)
                if ours is None:
                    ours = self._entries[moment] = Entry.empty(self.channels, self.rows_per_timestep)
                ours.absorb(theirs)
            if other.moments is not None:
                self.moments = self.moments or SecondMoments(self.channels)
                self.moments.merge(other.moments)

    def check_mergeable(self, other: ChannelStatistics) -> None:
        """Check that :meth:`merge` would succeed.

        Raises:
            ConfigurationError: the runs sample different numbers of rows, or share a seed at a common timestep, so that
                the same random numbers would have picked the rows of both.
            CalibrationError: the keys or the numbers of channels differ, or the second moments of one are sealed.
        """
        for statistics in (self, other):
            if statistics.moments is not None:
                statistics.moments.check_open()
        if other.key != self.key:
            raise CalibrationError(f"cannot merge statistics of {other.key!r} into those of {self.key!r}")
        if other.num_rows != self.num_rows:
            raise ConfigurationError(
                f"cannot merge statistics of {self.key!r}: one run keeps {self.num_rows} rows per timestep, the other "
                f"{other.num_rows}. Record both with the same number."
            )
        if self.channels and other.channels and other.channels != self.channels:
            raise CalibrationError(
                f"cannot merge statistics of {self.key!r}: one run has {self.channels} channels, the other "
                f"{other.channels}. They come from different models."
            )
        shared = self.seeds & other.seeds
        if shared and self._entries.keys() & other._entries.keys():
            raise ConfigurationError(
                f"cannot merge statistics of {self.key!r}: both runs sampled rows with seed {min(shared)} at the same "
                "timesteps. Give each run its own seed."
            )

    # Views

    def _sorted(self) -> list[Entry]:
        return [self._entries[moment] for moment in sorted(self._entries)]

    def _stacked(self, tensors: Iterable[Tensor]) -> Tensor:
        stack = list(tensors)
        return torch.stack(stack) if stack else torch.empty(0, self.channels, dtype=torch.float32)

    @property
    def timesteps(self) -> Tensor:
        """Timesteps seen, ascending: ``[T]`` float64."""
        return torch.tensor(sorted(self._entries), dtype=torch.float64)

    @property
    def minimum(self) -> Tensor:
        """Exact minimum of each channel: ``[T, C]`` float32."""
        return self._stacked(entry.minimum for entry in self._sorted())

    @property
    def maximum(self) -> Tensor:
        """Exact maximum of each channel: ``[T, C]`` float32."""
        return self._stacked(entry.maximum for entry in self._sorted())

    @property
    def absmax(self) -> Tensor:
        """Exact largest magnitude of each channel: ``[T, C]`` float32."""
        return torch.maximum(self.minimum.abs(), self.maximum.abs())

    @property
    def count(self) -> Tensor:
        """Rows seen, not only those sampled: ``[T]`` int64."""
        return torch.tensor([entry.count for entry in self._sorted()], dtype=torch.int64)

    @property
    def rows_by_timestep(self) -> list[Tensor]:
        """The sampled rows of each of :attr:`timesteps`: T tensors ``[n, C]`` float32, n = min(R, count)."""
        return [entry.sample() for entry in self._sorted()]

    def rows(self) -> Tensor:
        """The sampled rows of all timesteps, one after the other: ``[n, C]`` float32, n <= T R.

        All timesteps that saw at least R rows have the same weight, however often calibration visited them.
        """
        samples = self.rows_by_timestep
        return torch.cat(samples) if samples else torch.empty(0, self.channels, dtype=torch.float32)

    @property
    def rows_per_timestep(self) -> int:
        """R, the most rows that are kept at each timestep."""
        return self.num_rows or rows_to_sample(max(self.channels, 1))

    @property
    def nbytes(self) -> int:
        """Bytes held: those given in the module's docstring, plus the second moments."""
        rows = self.rows_per_timestep
        moments = self.moments.nbytes if self.moments else 0
        return len(self._entries) * (4 * self.channels * (rows + 2) + 8 * (rows + 2)) + moments

    # Storage

    def _tensors(self) -> dict[str, Tensor]:
        """What a file holds of one key; ``rows`` ``[T, R, C]`` in order of priority ``[T, R]``, infinite if empty."""
        entries = self._sorted()
        orders = [np.argsort(entry.priorities, kind="stable") for entry in entries]
        pairs = list(zip(entries, orders, strict=True))
        return {
            "timesteps": self.timesteps,
            "count": self.count,
            "minimum": self.minimum,
            "maximum": self.maximum,
            "rows": torch.stack([entry.rows[torch.from_numpy(order)] for entry, order in pairs]),
            "priorities": torch.stack([torch.from_numpy(entry.priorities[order]) for entry, order in pairs]),
            **dict(self.moments.tensors() if self.moments else ()),
        }

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the state that :meth:`_tensors` returned.

        Raises:
            ValueError: shapes or dtypes do not fit together.
        """
        timesteps, minimum = tensors["timesteps"], tensors["minimum"]
        if timesteps.dim() != 1 or minimum.dim() != 2:
            raise ValueError("timesteps is not [T] or minimum is not [T, C]")
        moments, channels = len(timesteps), minimum.shape[1]
        self.channels = channels
        num_rows = self.rows_per_timestep
        expected = {
            "timesteps": ((moments,), torch.float64),
            "count": ((moments,), torch.int64),
            "minimum": ((moments, channels), torch.float32),
            "maximum": ((moments, channels), torch.float32),
            "rows": ((moments, num_rows, channels), torch.float32),
            "priorities": ((moments, num_rows), torch.float64),
        }
        for name, (shape, dtype) in expected.items():
            if tensors[name].shape != shape or tensors[name].dtype != dtype:
                raise ValueError(f"{name} is {list(tensors[name].shape)} {tensors[name].dtype}, not {shape} {dtype}")
        check_values(tensors)
        for i, moment in enumerate(timesteps.tolist()):
            self._entries[moment] = Entry(
                minimum=minimum[i].clone(),
                maximum=tensors["maximum"][i].clone(),
                rows=tensors["rows"][i].clone(),
                priorities=tensors["priorities"][i].clone().numpy(),
                count=int(tensors["count"][i]),
            )
        if "moments" in tensors or "moment_rows" in tensors:
            self.moments = SecondMoments.restore(tensors, channels)
