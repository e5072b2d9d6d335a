"""What calibration remembers of the values it observed, and nothing about how they will be quantized.

An ``fxquant::observe(x, timestep, key, axis)`` node hands each observed value to :meth:`Statistics.record`. Statistics
are kept per timestep as they come; which timesteps later share a bin, a scale or a shift is decided elsewhere. For
each key and timestep there are exact per-channel extremes, a row count, and a small uniform sample of rows (tokens)
from which quantiles and mean squared errors are estimated.

Why the sample can be merged: every row that passes by has a random priority, independent and exponentially
distributed, and the sample is the rows with the smallest ones. That is a function of the *set* of rows, so neither
their order nor how they were split into calls and runs matters. Only the winners' priorities are ever drawn: the k
smallest of n exponentials are cumulative sums of ``E_j / (n - j)`` with independent unit exponentials ``E_j`` (Rényi,
"On the theory of order statistics", 1953), and which rows they belong to is a random k-permutation.

Memory: ``T * (4 * C * (R + 2) + 8 * (R + 2))`` bytes a key, for T timesteps, C channels and R rows. All observed
linears of DiT-XL/2 at 50 timesteps and the default R take 0.67 GB. It grows with the number of *different*
timesteps, so calibrate on the sampler's own schedule rather than on random continuous times.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fxquant.disk.files import share
from fxquant.errors import CalibrationError, CheckpointError, ConfigurationError
from fxquant.statistics.channels import ChannelStatistics

_FORMAT = "fxquant-statistics"
_VERSION = 1
_TENSORS = (
    *("timesteps", "count", "minimum", "maximum", "rows", "priorities"),
    *("moments", "moment_timesteps", "moment_sums", "moment_counts"),
)


class _NeverReachedError(CalibrationError, KeyError):
    """Also a ``KeyError``, which is what the mixin methods of ``Mapping`` (``get``, ``in``) wait for."""

    __str__ = Exception.__str__  # KeyError would print the message as a quoted literal


class Statistics(Mapping[str, ChannelStatistics]):
    """All that one calibration run recorded: a mapping from the key of an observed value to its statistics.

    Args:
        num_rows: rows (tokens) sampled for each key and timestep; None for as many as :func:`rows_to_sample` says.
        seed: of the row samples. The same model, data and seed give identical statistics.
        transient: whether nobody wants them afterwards, so that large parts may be dropped once they are used.

    Raises:
        ConfigurationError: ``num_rows`` is not positive.
    """

    def __init__(self, *, num_rows: int | None = None, seed: int = 0, transient: bool = False) -> None:
        if num_rows is not None and num_rows < 1:
            raise ConfigurationError(f"statistics need at least one sampled row per timestep, got num_rows={num_rows}")
        self.num_rows = num_rows
        self.seed = seed
        self.transient = transient
        self.wants_moments: Callable[[str], bool] = lambda key: False
        """Of which values to record second moments, ``[C, C]`` each; calibration asks for what the recipe needs."""
        self._by_key: dict[str, ChannelStatistics] = {}

    def __getitem__(self, key: str) -> ChannelStatistics:
        """Statistics of one observed value.

        Raises:
            CalibrationError: nothing was recorded under ``key``.
        """
        try:
            return self._by_key[key]
        except KeyError:
            raise _NeverReachedError(
                f"calibration never reached layer {key!r} ({len(self._by_key)} others were recorded). Calibrate with "
                "calls that use it: the same optional inputs, guidance and schedule as at run time. Or leave it out of "
                "the recipe."
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_key)

    def __len__(self) -> int:
        return len(self._by_key)

    def __repr__(self) -> str:
        return (
            f"Statistics(keys={len(self)}, timesteps={len(self.timesteps)}, num_rows={self.num_rows}, "
            f"nbytes={self.nbytes})"
        )

    def _new(self, key: str) -> ChannelStatistics:
        return ChannelStatistics(key, num_rows=self.num_rows, seed=self.seed)

    def record(self, key: str, x: Tensor, timestep: Tensor, axis: int = -1) -> None:
        """Take in one observed value; see :meth:`ChannelStatistics.record`.

        Raises:
            CalibrationError: the shape of ``x`` or of ``timestep`` does not fit; nothing was recorded.
            NonFiniteError: ``x`` or ``timestep`` holds NaN or infinity; nothing was recorded.
        """
        statistics = self._by_key.get(key) or self._new(key)
        statistics.record(x, timestep, axis, moments=self.wants_moments(key))
        if len(statistics):  # an empty batch leaves the layer unreached
            self._by_key[key] = statistics

    def merge(self, other: Statistics) -> None:
        """Take in another run over other data; see :meth:`ChannelStatistics.merge`. ``other`` stays as it is.

        Raises:
            ConfigurationError: the runs sample different numbers of rows, or share a seed at a common timestep.
            CalibrationError: the channels of a key differ, or the statistics of one are sealed.
        """
        merged = {key: self._by_key.get(key) or self._new(key) for key in other}
        for key, ours in merged.items():  # all before any, so that an error leaves this run as it was
            ours.check_mergeable(other[key])
        for key, ours in merged.items():
            ours.merge(other[key])
        self._by_key.update(merged)

    def combine(self, keys: Iterable[str], name: str) -> None:
        """Let several values that were recorded have statistics together, under a name of their own.

        Args:
            keys: of the values, which have the same channels; their own statistics stay.
            name: key of what they have together; what was there before is replaced.

        Raises:
            CalibrationError: nothing was recorded under a key.
        """
        together = self._new(name)
        for key in keys:  # Each drew its rows with random numbers of its own, so the samples compete fairly.
            together._take(self[key])
        self._by_key[name] = together

    def seal(self) -> None:
        """Let second moments take half the room; nothing can be recorded, merged or saved after that."""
        for statistics in self._by_key.values():
            if statistics.moments is not None:
                statistics.moments.seal()

    @property
    def timesteps(self) -> Tensor:
        """Timesteps that any key saw, ascending: ``[T]`` float64."""
        moments: set[float] = set()
        for statistics in self._by_key.values():
            moments.update(statistics._entries)
        return torch.tensor(sorted(moments), dtype=torch.float64)

    @property
    def nbytes(self) -> int:
        """Bytes held by all keys together."""
        return sum(statistics.nbytes for statistics in self._by_key.values())

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file, from which recording and merging can go on."""
        tensors = {
            f"{key}.{name}": tensor
            for key, statistics in self._by_key.items()
            for name, tensor in statistics._tensors().items()
        }
        header = {
            "version": _VERSION,
            "num_rows": self.num_rows,
            "seed": self.seed,
            "keys": {key: sorted(statistics.seeds) for key, statistics in self._by_key.items()},
        }
        save_file(tensors, path, metadata={_FORMAT: json.dumps(header)})
        share(Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read what :meth:`save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, not of this kind, or of a newer format.
        """
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                text = (file.metadata() or {}).get(_FORMAT)
                if text is None:
                    raise CheckpointError(f"{path} holds no fxquant statistics. Give the file that save() wrote.")
                header: dict[str, Any] = json.loads(text)
                if header["version"] > _VERSION:
                    raise CheckpointError(
                        f"{path} has statistics of format {header['version']}; this fxquant reads up to {_VERSION}. "
                        "Upgrade fxquant, or calibrate again."
                    )
                loaded, held = cls(num_rows=header["num_rows"], seed=header["seed"]), set(file.keys())
                for key, seeds in header["keys"].items():
                    statistics = loaded._new(key)
                    statistics.seeds = frozenset(seeds)
                    names = [name for name in _TENSORS if f"{key}.{name}" in held]
                    statistics._restore({name: file.get_tensor(f"{key}.{name}") for name in names})
                    loaded._by_key[key] = statistics
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"cannot read statistics from {path}: {error}. Calibrate again.") from error
        return loaded
