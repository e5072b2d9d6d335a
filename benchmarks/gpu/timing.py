"""Measures times on the device between CUDA events."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu.modes import Run

_SECONDS = 0.02
"""The least seconds between the two events around the calls of a system in a round."""
_MOST_CALLS = 50
_CACHE = 256 << 20
"""Bytes that are cleared before a product; more than the caches hold."""


@dataclass
class Turn:
    """Something that every round calls.

    Attributes:
        run: The call.
        seconds: Seconds per call, one value per round.
        calls: Number of calls between two events.
    """

    run: Run
    seconds: list[float]
    calls: int = 0


def take_turns(turns: Sequence[Turn], rounds: int, ended: Callable[[], bool] = lambda: False) -> None:
    """Add rounds to all turns. Every round is complete, so entries at the same index belong to the same round.

    Args:
        turns: The turns to call.
        rounds: Number of rounds.
        ended: Returns whether no time is left for another round. The first round runs in any case.
    """
    for turn in turns:
        turn.calls = turn.calls or _calls(turn.run)
    for number in range(rounds):
        if number and ended():
            break
        for turn, seconds in [(turn, _seconds(turn.run, turn.calls)) for turn in turns]:
            turn.seconds.append(seconds)


def _calls(run: Run) -> int:
    if not torch.cuda.is_available():
        return 1
    return max(1, min(_MOST_CALLS, math.ceil(_SECONDS / _seconds(run, 1))))


def _seconds(run: Run, calls: int) -> float:
    if not torch.cuda.is_available():  # In a rehearsal, whose times mean nothing.
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    run()  # An unmeasured call, because other systems changed caches and clocks.
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end) / calls


class ColdCaches:
    """Times single runs with cold device caches."""

    def __init__(self, device: torch.device) -> None:
        self._buffer: Tensor = torch.empty(_CACHE, dtype=torch.int8, device=device)

    def seconds(self, run: Run, runs: int) -> list[float]:
        """Seconds of each of `runs` runs. Clearing the buffer also gives the host time to enqueue the next run."""
        pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(runs)]
        for start, end in pairs:
            self._buffer.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [1e-3 * start.elapsed_time(end) for start, end in pairs]
