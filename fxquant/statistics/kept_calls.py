"""Calls of the model that statistics keep, to run graphs again: for error attribution, and for later conversions.

A bounded number of calls is kept, spread evenly over the kinds of call and the timesteps. Which call of a timestep is
kept is random, by priorities that depend only on the seed and on how many calls came before. So a rerun keeps the same
calls, and the choice does not alias with the order of a sampler's steps.
"""

from __future__ import annotations

import hashlib
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxquant.errors import CalibrationError
from fxquant.memory.bound import kept


@dataclass(frozen=True)
class Run:
    """The model and the sampling that statistics were recorded from.

    Attributes:
        model_class: Import path of the model's class.
        weights: Digest of the model's weights.
        timestep: Name of the model's timestep input.
        step: Number of the one denoising step that was observed, counted from 0; None for all steps.
        later: Number of later steps that were observed as well.
        prepared: The passes before calibration that may change what layers read, as text. Observed values are those of
            the graph after them.
    """

    model_class: str
    weights: str
    timestep: str | None
    step: int | None = None
    later: int = 0
    prepared: tuple[str, ...] = ()

    def check_prepared(self, passes: Sequence[str], what: str) -> None:
        """Refuse statistics of values that other passes made.

        Args:
            passes: The passes of another recipe, as in :attr:`prepared`.
            what: What these passes are of, for the message, such as ``this recipe``.

        Raises:
            CalibrationError: If they differ; names the passes of both.
        """
        if tuple(passes) != self.prepared:
            before, now = (", ".join(given) or "no such pass" for given in (self.prepared, passes))
            raise CalibrationError(
                f"the statistics are of what layers read after passes that may change it ({before}), and {what} has "
                f"{now} before calibration; use the same passes, or calibrate again. A pass that changes no input of a "
                "layer says so by keeps_inputs = True"
            )

    def check_same(self, other: Run, what: str) -> None:
        """Refuse statistics of another model or of other steps.

        Args:
            other: The other run.
            what: What the other run is, for the message, such as ``this model``.

        Raises:
            CalibrationError: If the runs differ; the message says in what.
        """
        if self.model_class != other.model_class:
            raise CalibrationError(
                f"the statistics are of a {self.model_class}, but {what} is a {other.model_class}; calibrate again"
            )
        if self.weights != other.weights:
            raise CalibrationError(
                f"the statistics were recorded with other weights or another dtype than those of {what}; load the "
                "model that was calibrated, in the same dtype, or calibrate again"
            )
        if self.timestep != other.timestep:
            raise CalibrationError(
                f"the statistics were recorded with timestep={self.timestep!r}, and {what} has "
                f"timestep={other.timestep!r}; pass the same name, or calibrate again"
            )


@dataclass(frozen=True, eq=False)
class KeptCall:
    """Part of one call.

    Attributes:
        kind: Number of its kind of call.
        timestep: Timestep of its first sample. If each token has a timestep, that of the noisiest token.
        number: How many calls came before.
        priority: From 0 to 1, random; of the calls of a timestep those with the smallest priorities are kept.
        inputs: The tensors that the graph of its kind reads, in order, on the CPU.
    """

    kind: int
    timestep: float
    number: int
    priority: float
    inputs: tuple[Tensor, ...]

    @property
    def order(self) -> tuple[int, float]:
        """Key that sorts calls by when they came."""
        return self.number, self.priority

    @property
    def group(self) -> tuple[int, float]:
        """The calls of one kind and timestep compete with each other."""
        return self.kind, self.timestep


@dataclass(eq=False)
class KeptCalls:
    """The kinds of call that were seen, and some of the calls.

    Attributes:
        most: The most calls to keep, over all kinds; 0 for none.
        seed: Seed of the choice.
        kinds: The kinds of call, as :meth:`fxquant.capture.calls.CallSpec.to_json` writes them.
    """

    most: int = 0
    seed: int = 0
    kinds: list[dict[str, Any]] = field(default_factory=list)
    _calls: list[KeptCall] = field(default_factory=list)
    _seen: int = 0

    def __post_init__(self) -> None:
        # Inputs that stay the same from step to step, such as embeddings of prompts, are held once.
        self._pool: weakref.WeakValueDictionary[str, Tensor] = weakref.WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._calls)

    def __iter__(self) -> Iterator[KeptCall]:
        """The calls, in the order in which they came."""
        return iter(sorted(self._calls, key=lambda call: call.order))

    @property
    def seen(self) -> int:
        """How many calls came, kept or not. The priorities of later calls depend on it."""
        return self._seen

    @property
    def nbytes(self) -> int:
        """Bytes of all inputs; a tensor that several calls share counts once."""
        return sum(tensor.nbytes for tensor in {id(t): t for call in self._calls for t in call.inputs}.values())

    def kind(self, spec: Mapping[str, Any]) -> int:
        """Number of a kind of call, which is added if it is new."""
        if spec not in self.kinds:
            self.kinds.append(dict(spec))
        return self.kinds.index(dict(spec))

    def of_kind(self, kind: int) -> list[KeptCall]:
        """The calls of one kind, in the order in which they came."""
        return [call for call in self if call.kind == kind]

    def wants(self, kind: int, timestep: float) -> float | None:
        """The priority of the next call if it must be kept, else None; then pass the call to :meth:`keep`."""
        number = self._seen
        self._seen += 1
        if not self.most:
            return None
        key = np.array([self.seed & (2**64 - 1), 0], dtype=np.uint64)
        priority = float(np.random.Generator(np.random.Philox(key=key, counter=number)).random())
        trial = KeptCall(kind, timestep, number, priority, ())
        return None if self._surplus([*self._calls, trial]) is trial else priority

    def keep(self, kind: int, timestep: float, priority: float, inputs: Sequence[Tensor]) -> None:
        """Keep a copy of the call that :meth:`wants` asked for."""
        pooled = tuple(self._pooled(tensor) for tensor in inputs)
        self._add(KeptCall(kind, timestep, self._seen - 1, priority, pooled))

    def restore(self, calls: Sequence[KeptCall], seen: int | None = None) -> None:
        """Put back calls that were read from a file.

        Args:
            calls: The calls.
            seen: How many calls came in all; None for files of earlier versions, which do not say. Calls that were
                dropped after the last kept one are then not counted, and calls that come later get other priorities.
        """
        self._calls = list(calls)
        self._seen = 1 + max((call.number for call in calls), default=-1) if seen is None else seen
        for call in calls:
            for tensor in call.inputs:
                self._pool.setdefault(_digest(tensor), tensor)

    def merge(self, other: KeptCalls) -> None:
        """Add the kinds and calls of another run, as many of both as fit; ``other`` does not change."""
        numbers = [self.kind(spec) for spec in other.kinds]
        for call in other:
            pooled = tuple(self._pooled(tensor) for tensor in call.inputs)
            if self.most:
                self._add(KeptCall(numbers[call.kind], call.timestep, self._seen + call.number, call.priority, pooled))
        self._seen += other._seen

    def _add(self, call: KeptCall) -> None:
        self._calls.append(call)
        surplus = self._surplus(self._calls)
        if surplus is not None:
            self._calls.remove(surplus)

    def _surplus(self, calls: Sequence[KeptCall]) -> KeptCall | None:
        """The call to drop if these are too many: of the fullest group, the one with the largest priority."""
        if len(calls) <= self.most:
            return None
        sizes = Counter(call.group for call in calls)
        return max(calls, key=lambda call: (sizes[call.group], call.priority))

    def _pooled(self, tensor: Tensor) -> Tensor:
        held = kept(tensor.detach().to("cpu", copy=True).contiguous())
        return self._pool.setdefault(_digest(held), held)


def _digest(tensor: Tensor) -> str:
    found = hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), digest_size=16)
    found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
