"""Which timesteps are measured, in which order, and with which of the kept calls."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxquant.errors import ConfigurationError
from fxquant.statistics.kept_calls import KeptCall, KeptCalls

_CALLS_PER_TIMESTEP = 4  # Calls that are kept per timestep when a function runs the model.


def wanted_calls(timesteps: int | Sequence[float]) -> int:
    """How many calls to keep so that these timesteps can be measured."""
    # Twice as many timesteps as wanted may occur between those that are chosen.
    return 64 * _CALLS_PER_TIMESTEP if not isinstance(timesteps, int) else max(64, timesteps * _CALLS_PER_TIMESTEP)


def chosen_timesteps(kept: KeptCalls, timesteps: int | Sequence[float]) -> list[float]:
    """The timesteps to measure, the noisiest first: a number of them, spread evenly, or those that are listed.

    Raises:
        ConfigurationError: If no call was kept at a listed timestep.
    """
    known = sorted({call.timestep for call in kept}, reverse=True)
    if isinstance(timesteps, int):
        if timesteps >= len(known):
            return known
        places = torch.linspace(0, len(known) - 1, timesteps, dtype=torch.float64).round().long()
        return [known[number] for number in places.tolist()]
    missing = [step for step in timesteps if step not in known]
    if missing:
        listed = ", ".join(f"{step:g}" for step in known[:12])
        raise ConfigurationError(f"no call was kept at timestep {missing[0]:g}; there are calls at {listed}")
    return sorted(set(map(float, timesteps)), reverse=True)


def spread_order(timesteps: Sequence[float]) -> list[float]:
    """The timesteps in an order whose beginning covers the schedule evenly, whatever its length."""
    bits = max(1, (len(timesteps) - 1).bit_length())
    order = sorted(range(len(timesteps)), key=lambda i: int(f"{i:0{bits}b}"[::-1], 2))
    return [timesteps[number] for number in order]


def calls_at(kept: KeptCalls, step: float) -> list[KeptCall]:
    """For each kind of call, the first one that was kept of a timestep."""
    calls: dict[int, KeptCall] = {}
    for call in kept:
        if call.timestep == step:
            calls.setdefault(call.kind, call)
    return list(calls.values())
