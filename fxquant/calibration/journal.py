"""Keeps what calls of a calibration computed, so that an interrupted calibration continues behind its last call.

The sampler of an interrupted run starts from the beginning when the run is repeated, and goes through the same steps.
For each call that was finished, it gets the output that was kept, and nothing is computed or observed. Then the
statistics are put back, and the next call runs as usual. So the result has the same bits as without the interruption.

A call is recognized by its inputs, and by the operations and weights of its graph. If a repeated run makes another call
than the first run, nothing of the first run is used: calls that were answered from the journal up to there are observed
again.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxquant.capture import constants
from fxquant.capture.calls import Call
from fxquant.disk.finished_work import FinishedWork, Part, digest_of_tensor
from fxquant.statistics.collection import Statistics
from fxquant.statistics.keeping import Index, KeptStatistics
from fxquant.statistics.kept_calls import Run

log = logging.getLogger(__name__)

SHARE = 0.2
"""The share of the time of calls that keeping may take; if it takes more, it waits until further calls have run."""
SHORT = 0.05
"""Seconds that keeping may take after each call, whatever the share is."""

_SPREAD = 1000
"""The most elements of memory for each element of an output, which may be a slice of a larger tensor."""

_STATE = "calibration"

Compute = Callable[[int, Call, bool], Sequence[Any]]
"""Runs a call on the graph of a number, observed or not, and returns the leaves of the output."""


class Journal:
    """The finished calls of one calibration.

    Outputs are kept after each call. Statistics are kept after each call too, as long as this takes at most
    :data:`SHORT` seconds or :data:`SHARE` of the time of the calls; otherwise after several calls. So an interruption
    loses one call, or calls that together take at most ``1 / SHARE`` times as long as keeping takes once.

    Args:
        work: Where they are kept.
        run: The model and its sampling.
        recipe: The recipe as text.
        statistics: Receives what was observed. The calibration also depends on what it holds at the beginning.
        compute: Runs a call.
        identity: Digest of what the graph of a number computes.

    Attributes:
        computed: Number of calls that were computed, not taken from the journal.
    """

    def __init__(
        self,
        work: FinishedWork,
        run: Run,
        recipe: str,
        statistics: Statistics,
        compute: Compute,
        identity: Callable[[int], str],
    ) -> None:
        self.work, self.statistics, self.compute = work, statistics, compute
        self.identity = functools.cache(identity)
        self.computed = 0
        self._kept = KeptStatistics(work)
        self.made_from = {
            "model": run.model_class,
            "weights": run.weights,
            "name of the timestep": str(run.timestep),
            "recipe": recipe,
            "earlier statistics": self._kept.digest(statistics),
        }
        self._index: Index | None
        self._index, self._held = work.load(_STATE, self.made_from, _state_of) or (None, 0)
        """How many calls are answered from the journal; later ones that it holds were not observed to the end."""
        self._position = 0
        self._answered: list[tuple[int, Call, bool]] = []  # Since the beginning, until the statistics are back.
        self._pool: dict[str, Tensor] = {}  # Their inputs; those that stay the same from call to call are held once.
        self._pending, self._calls_took, self._keeping_took = False, 0.0, 0.0

    def run(self, graph: int, call: Call, observed: bool) -> Sequence[Any]:
        """The leaves of the output of the next call.

        Args:
            graph: Number of the graph that serves it.
            call: The call.
            observed: Whether observers record it.

        Raises:
            WriteError: If what it computed cannot be kept.
        """
        leaves = [digest_of_tensor(leaf) if isinstance(leaf, Tensor) else repr(leaf) for leaf in call.leaves]
        key = hashlib.sha256(
            repr((self.identity(graph), call.names, call.structure, leaves, observed)).encode()
        ).hexdigest()
        if self._position < self._held:
            found = self._answer(key)
            if found is not None:
                self._answered.append((graph, self._copied(call, leaves), observed))
                self._position += 1
                if self._position == self._held:
                    self._put_back()
                return found
        began = time.perf_counter()
        output = self.compute(graph, call, observed)
        self.computed += 1
        self._calls_took += time.perf_counter() - began
        began = time.perf_counter()
        self._write(key, output)
        self._position += 1
        self._pending = True
        if self._keeping_took <= max(SHORT, SHARE * self._calls_took):
            self._keep()
            self._calls_took, self._keeping_took = 0.0, time.perf_counter() - began
        return output

    def finish(self) -> None:
        """Keep what is not kept yet; called after the last call."""
        if self._position < self._held:
            self._observe_again(f"this run makes only {self._position} of the {self._held} calls that are kept")
        if self._pending or self._held != self._position:
            self._keep()

    def _answer(self, key: str) -> Sequence[Any] | None:
        """The output that was kept of the next call; None if there is none, and then the journal is given up."""
        found = self.work.load(_name(self._position), self.made_from, _answer_of)
        if found is None:
            self._observe_again(f"what is kept of call {self._position} cannot be used")
            return None
        of, leaves = found
        if of != key:
            self._observe_again(
                f"call {self._position} of this run has other inputs than the call that is kept, or the model computes "
                "something else; to continue, give the same model, samples, steps, seed, guidance and prompts"
            )
            return None
        return leaves

    def _write(self, key: str, output: Sequence[Any]) -> None:
        tensors, leaves = {}, []
        for number, leaf in enumerate(output):
            if isinstance(leaf, Tensor):
                tensors[str(number)] = leaf
                leaves.append({"strides": list(leaf.stride()), "device": str(leaf.device)})
            else:
                leaves.append({"constant": constants.to_json(leaf)})
        self.work.save(_name(self._position), self.made_from, tensors, {"key": key, "leaves": leaves})

    def _keep(self) -> None:
        """Keep the statistics as they are now, together with the number of calls that they are of."""
        index = self._kept.save(self.statistics, self.made_from)
        self.work.save(_STATE, self.made_from, data={"calls": self._position, "statistics": index})
        if self._index is None:
            self._remove_others(index)
        else:
            self._kept.remove_replaced(self._index, index)
        self._index, self._held, self._pending = index, self._position, False

    def _remove_others(self, index: Index) -> None:
        """Remove files of other runs, and those that a killed run did not finish."""
        calls = [_name(number) for number in range(self._position)]
        self.work.keep_only([_STATE, *calls, *self._kept.files(index)])

    def _put_back(self) -> None:
        """All calls that were finished have been answered: put back what they observed."""
        assert self._index is not None
        if self._kept.load(self._index, self.statistics, self.made_from):
            log.info("%d calls are taken from %s", self._held, self.work.folder)
            self._remove_others(self._index)
            self._answered.clear()
            self._pool.clear()
        else:
            self._observe_again("statistics that are kept are missing or damaged")

    def _observe_again(self, reason: str) -> None:
        """Give up what an interrupted run observed. The calls that were answered up to here are observed now."""
        self.work.warn(f"{self.work.folder}: {reason}; calls are computed and observed anew")
        self.work.remove(_STATE)  # First, because the files that it names are now written anew.
        self._held, self._index, self._kept = 0, None, KeptStatistics(self.work)
        for graph, call, observed in self._answered:
            if observed:
                self.compute(graph, call, True)
                self.computed += 1
        self._pending = bool(self._answered)
        self._answered.clear()
        self._pool.clear()

    def _copied(self, call: Call, leaves: Sequence[str]) -> Call:
        """A copy, because samplers may write into the tensors of a call."""
        pairs = zip(call.leaves, leaves, strict=True)
        return call.with_leaves([self._pooled(leaf, digest) for leaf, digest in pairs])

    def _pooled(self, leaf: Any, digest: str) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        key = f"{leaf.device} {leaf.stride()} {digest}"
        if key not in self._pool:
            self._pool[key] = leaf.detach().clone()
        return self._pool[key]


def _name(call: int) -> str:
    return f"call-{call:06}"


def _state_of(part: Part) -> tuple[Index, int]:
    """The index of the statistics, and the number of calls that they are of.

    Raises:
        ValueError: There is another number of calls than of at least one.
    """
    index, calls = part.data["statistics"], part.data["calls"]
    KeptStatistics.check(index)
    if type(calls) is not int or calls < 0:
        raise ValueError(f"it is of {calls!r} calls")
    return index, calls


def _answer_of(part: Part) -> tuple[str, list[Any]]:
    """The key of a call, and the leaves of its output."""
    leaves: list[Any] = []
    for number, entry in enumerate(part.data["leaves"]):
        if "strides" in entry:
            leaves.append(_laid_out(part.tensors[str(number)], entry["strides"], entry["device"]))
        else:
            leaves.append(constants.from_json(entry["constant"]))
    return part.data["key"], leaves


def _laid_out(tensor: Tensor, strides: Sequence[int], device: str) -> Tensor:
    """A tensor on a device with the memory layout that it had, because sums over it depend on the layout."""
    if 0 in strides and tensor.numel():  # An expanded tensor has no memory of its own for each element.
        return tensor.to(device)
    reach = sum(stride * (size - 1) for size, stride in zip(tensor.shape, strides, strict=True))
    if tensor.numel() and reach > _SPREAD * tensor.numel():
        raise ValueError(f"strides {strides} do not belong to a tensor of shape {list(tensor.shape)}")
    laid_out = torch.empty_strided(tensor.shape, tuple(strides), dtype=tensor.dtype, device=device)
    return laid_out.copy_(tensor)
