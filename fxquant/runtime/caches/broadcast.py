"""Pyramid attention broadcast: attentions return in some steps what they returned before."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, fx, nn

from fxquant.errors import ConfigurationError
from fxquant.runtime.caches.cutting import Run
from fxquant.runtime.caches.modules import Modules

_KINDS = ("spatial", "temporal", "cross")


@dataclass
class Memory:
    """What the steps of a generation left.

    Attributes:
        step: Number of steps so far.
        returned: By attention, what it returned when it ran last.
    """

    step: int = 0
    returned: dict[str, list[Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Schedule:
    """When attentions of one kind run.

    Attributes:
        every: They run in one of this many steps,
        between: and in each step whose timestep is not between these two.
    """

    every: int
    between: tuple[float, float]

    def skips(self, step: int, timestep: float) -> bool:
        """Whether they return in a step what they returned before."""
        return step > 0 and self.between[0] < timestep < self.between[1] and step % self.every != 0


@dataclass(frozen=True)
class Broadcast:
    """``PyramidAttentionBroadcastConfig`` of diffusers, with its arithmetic. Contexts do not count each other's steps.

    Attributes:
        schedules: By path of each attention, when it runs.
        timestep: Returns the present timestep.
    """

    schedules: Mapping[str, Schedule]
    timestep: Callable[[], float]

    needs_context: ClassVar[bool] = False

    @classmethod
    def of(cls, config: Any, model: nn.Module) -> Broadcast:
        """The rule of a config for a model.

        Raises:
            ConfigurationError: If the config fits no attention.
        """
        from diffusers.hooks._common import _ATTENTION_CLASSES

        every = {kind: getattr(config, f"{kind}_attention_block_skip_range") for kind in _KINDS}
        if not any(every.values()):
            every["spatial"] = 2  # As in diffusers.
        found = {}
        for name, module in model.named_modules():
            crosses = getattr(module, "is_cross_attention", False)
            for kind in _KINDS if isinstance(module, _ATTENTION_CLASSES) else ():
                names = getattr(config, f"{kind}_attention_block_identifiers")
                fits = any(re.search(pattern, name) for pattern in names) and crosses == (kind == "cross")
                if fits and every[kind] is not None and name not in found:
                    between = getattr(config, f"{kind}_attention_timestep_skip_range")
                    found[name] = Schedule(every[kind], tuple(between))
        if not found:
            raise ConfigurationError(
                f"no attention of {type(model).__name__} is of a kind that this PyramidAttentionBroadcastConfig skips; "
                "use FirstBlockCacheConfig, or give the skip range of another kind"
            )
        return cls(found, config.current_timestep_callback)

    def cut(self, module: fx.GraphModule) -> Modules:
        """Find the attentions in a graph."""
        return Modules.of(module, self.schedules)

    def memory(self) -> Memory:
        """What is known before the first step."""
        return Memory()

    def run(self, parts: Modules, inputs: Sequence[Any], memory: Memory, run: Run) -> tuple[Any, bool]:
        """The outputs of a graph, and whether attentions were skipped.

        Raises:
            ConfigurationError: If the timestep is not known.
        """
        now = self._now()
        skipped = [path for path, schedule in self.schedules.items() if schedule.skips(memory.step, now)]
        leaves, made = parts.run(inputs, {path: memory.returned[path] for path in skipped}, run)
        memory.returned |= made
        memory.step += 1
        return leaves, bool(skipped)

    def _now(self) -> float:
        found = self.timestep()
        try:
            return float(found)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigurationError(
                f"current_timestep_callback of PyramidAttentionBroadcastConfig returned {found!r} in this call, not a "
                "timestep. A pipeline knows it while it runs; in a loop of your own, return the timestep of the step"
            ) from error
