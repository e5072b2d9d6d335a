"""What a cache keeps from step to step, apart for each thread and each name of ``cache_context``.

A generation must not read what another one left. Pipelines reset a cache when they end. A generation that ended early
did not, so the timestep of each call is compared with that of the call before: within a generation it moves in one
direction.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_MOST = 8  # Kinds of call whose state a thread keeps: each holds activations.
_LARGE = 1 << 24  # Number of elements above which an input is not kept for the next step.


@dataclass
class Progress:
    """How far the generation has come that calls of one kind belong to.

    Attributes:
        timestep: The timestep of the last call, the mean if it has several; None before the first call.
        direction: -1 if timesteps fall, 1 if they rise, 0 while that is not known.
        known: The other inputs of the last call.
        first: The other inputs of the last call by name, while the direction is not known; without large ones.
    """

    timestep: float | None = None
    direction: float = 0.0
    known: tuple[weakref.ref[Tensor], ...] = ()
    first: Mapping[str, Tensor] = field(default_factory=dict)

    def begins_anew(self, named: Mapping[str, Tensor], timestep: str | None) -> bool:
        """Whether a call begins a new generation. The call then is the last call.

        It does if its timestep lies behind that of the last call. If it is the same, or the direction is not known yet,
        the inputs tell: within a generation the prompt stays, and some solvers call the model twice at a timestep.
        """
        if timestep is None or timestep not in named:
            return False
        now, before = float(named[timestep].detach().double().mean()), self.timestep
        others = {name: tensor for name, tensor in named.items() if name != timestep}
        direction = 0.0 if before is None or now == before else math.copysign(1.0, now - before)
        turned = direction * self.direction < 0
        anew = turned
        if before is not None and (now == before or not self.direction):
            anew = self._changed(others, moved=now != before)
        self.timestep = now
        self.direction = 0.0 if turned else direction or self.direction
        self.known = tuple(weakref.ref(tensor) for tensor in others.values())
        small = {name: tensor.detach() for name, tensor in others.items() if tensor.numel() <= _LARGE}
        self.first = {} if self.direction else small
        return anew

    def _changed(self, others: Mapping[str, Tensor], moved: bool) -> bool:
        """Whether other inputs than the latents changed, which are those that change in each step.

        An input that is the same object did not. All are other objects if the caller makes them anew in each step, as
        offloading does, or if there are only latents. Then the values of the first step tell, or nothing does. Numbers
        for each sample do not tell: they may be a second timestep, or a guidance that is always the same.
        """
        held = {id(tensor) for tensor in others.values()}
        if any(id(known()) in held for known in self.known):
            return False
        telling = [name for name, tensor in others.items() if tensor.dim() > 1 or not tensor.is_floating_point()]
        if len(telling) < 2:
            return not moved and not self.direction
        if not moved:
            return True
        return sum(name not in self.first or not _equal(self.first[name], others[name]) for name in telling) > 1


def _equal(left: Tensor, right: Tensor) -> bool:
    return left.device == right.device and left.dtype == right.dtype and torch.equal(left, right)


@dataclass
class _Held:
    progress: Progress
    memory: Any


@dataclass
class Context(threading.local):
    """Where one thread is.

    Attributes:
        name: The name of the ``cache_context`` that the thread is in; None outside of one.
    """

    name: str | None = None


@dataclass
class States(threading.local):
    """The states of one thread."""

    _held: dict[Hashable, _Held] = field(default_factory=dict)

    def of(self, key: Hashable, named: Mapping[str, Tensor], timestep: str | None, make: Callable[[], Any]) -> Any:
        """The state for a call; made anew if the call begins a generation.

        Args:
            key: What calls that share a state have in common.
            named: The tensor inputs of the call by name.
            timestep: Name of the input that holds the timestep, or None.
            make: Makes an empty state.
        """
        held = self._held.pop(key, None) or _Held(Progress(), make())
        if held.progress.begins_anew(named, timestep):
            held.memory = make()
        self._held[key] = held
        while len(self._held) > _MOST:
            del self._held[next(iter(self._held))]
        return held.memory

    def reset(self) -> None:
        """Forget everything."""
        self._held.clear()


def kind_of(cut: Hashable, inputs: list[Any]) -> Hashable:
    """What calls have in common whose values can be added: the graph, and shapes, dtypes and devices of the inputs."""
    tensors = [tensor for tensor in inputs if isinstance(tensor, torch.Tensor)]
    return cut, tuple((tuple(tensor.shape), tensor.dtype, tensor.device) for tensor in tensors)
