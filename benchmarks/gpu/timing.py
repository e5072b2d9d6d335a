"""Times on the device, between CUDA events."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu.modes import Run

_SECONDS = 0.02
"""That pass between the two events around a system's calls in a round, at least."""
_MOST_CALLS = 50
_CACHE = 256 << 20
"""Bytes that are cleared before a product, more than caches hold."""


@dataclass
class Turn:
    """Something that is called by turns.

    Attributes:
        run: The call.
        seconds: Of a call, a round each.
        calls: How many of them are between two events.
    """

    run: Run
    seconds: list[float]
    calls: int = 0


def take_turns(turns: Sequence[Turn], rounds: int, ended: Callable[[], bool] = lambda: False) -> None:
    """Add rounds to all; each round is complete, so that entries of one place belong together.

    Args:
        turns: What is called.
        rounds: How many times each.
        ended: Whether there is no time left for another round; the first one is made in any case.
    """
    for turn in turns:
        turn.calls = turn.calls or max(1, min(_MOST_CALLS, math.ceil(_SECONDS / _seconds(turn.run, 1))))
    for number in range(rounds):
        if number and ended():
            break
        for turn, seconds in [(turn, _seconds(turn.run, turn.calls)) for turn in turns]:
            turn.seconds.append(seconds)


def _seconds(run: Run, calls: int) -> float:
    run()  # So that none finds caches and clocks as its neighbour left them.
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end) / calls


class ColdCaches:
    """Times single runs with nothing in the device's caches."""

    def __init__(self, device: torch.device) -> None:
        self._buffer: Tensor = torch.empty(_CACHE, dtype=torch.int8, device=device)

    def seconds(self, run: Run, runs: int) -> list[float]:
        """Of that many runs. Clearing the buffer also gives the host time to hand over the run behind it."""
        pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(runs)]
        for start, end in pairs:
            self._buffer.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [1e-3 * start.elapsed_time(end) for start, end in pairs]
