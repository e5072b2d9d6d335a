"""TaylorSeer: what modules return is extrapolated from the steps in which they ran."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from fxquant.errors import ConfigurationError
from fxquant.runtime.caches.cutting import Run
from fxquant.runtime.caches.modules import Modules


@dataclass
class Memory:
    """What the steps of a generation left.

    Attributes:
        step: Number of the present step, from 0.
        last: Number of the last step in which the modules ran.
        factors: By module, for each value that it returns: the value and its finite differences.
        like: By module, for each value that it returns: an empty tensor of its dtype and device, and its shape.
    """

    step: int = -1
    last: int | None = None
    factors: dict[str, list[list[Tensor]]] = field(default_factory=dict)
    like: dict[str, list[tuple[Tensor, torch.Size]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Taylor:
    """``TaylorSeerCacheConfig`` of diffusers, with its arithmetic.

    Attributes:
        modules: By path of each module that is not computed in some steps: whether its values are extrapolated; else
            they are zeros in these steps.
        interval: The modules run in one of this many steps.
        before: They run in each step before this one.
        after: They run in each step from this one on; None if there is no such step.
        order: The highest difference that is used.
        dtype: The dtype in which values and differences are kept; None for their own.
    """

    modules: Mapping[str, bool]
    interval: int
    before: int
    after: int | None
    order: int
    dtype: torch.dtype | None

    needs_context: ClassVar[bool] = True

    @classmethod
    def of(cls, config: Any, model: nn.Module) -> Taylor:
        """The rule of a config for a model.

        Raises:
            ConfigurationError: If the config fits no module.
        """
        from diffusers.hooks import taylorseer_cache as theirs

        zeros, active = config.skip_predict_identifiers or [], config.cache_identifiers or []
        active = active or theirs._TRANSFORMER_BLOCK_IDENTIFIERS
        if config.use_lite_mode:
            zeros, active = theirs._BLOCK_IDENTIFIERS, theirs._PROJ_OUT_IDENTIFIERS
        found = {
            name: not _fits(zeros, name)
            for name, _ in model.named_modules()
            if name and (_fits(zeros, name) or _fits(active, name))
        }
        if not any(found.values()):
            raise ConfigurationError(
                f"no module of {type(model).__name__} has a name that fits {', '.join(active)}; name those to cache: "
                r"TaylorSeerCacheConfig(cache_identifiers=[r'.*blocks\.\d+'])"
            )
        chosen = config.cache_interval, config.disable_cache_before_step, config.disable_cache_after_step
        return cls(found, *chosen, config.max_order, config.taylor_factors_dtype)

    def cut(self, module: fx.GraphModule) -> Modules:
        """Find the modules in a graph."""
        return Modules.of(module, self.modules, [path for path, active in self.modules.items() if not active])

    def memory(self) -> Memory:
        """What is known before the first step."""
        return Memory()

    def run(self, parts: Modules, inputs: Sequence[Any], memory: Memory, run: Run) -> tuple[Any, bool]:
        """The outputs of a graph, and whether modules were skipped."""
        memory.step += 1
        skips = not self._computes(memory.step) and memory.last is not None
        given = {path: self._predicted(path, memory) for path in self.modules} if skips else {}
        leaves, made = parts.run(inputs, given, run)
        if not skips:
            for path, values in made.items():
                self._update(path, values, memory)
            memory.last = memory.step
        return leaves, skips

    def _computes(self, step: int) -> bool:
        last = self.after is not None and step >= self.after
        return step < self.before or (step - self.before - 1) % self.interval == 0 or last

    def _update(self, path: str, values: Sequence[Tensor], memory: Memory) -> None:
        memory.like[path] = [(value.new_empty(0), value.shape) for value in values]
        if self.modules[path]:
            before = memory.factors.get(path, [[] for _ in values])
            memory.factors[path] = [self._factors(*pair, memory) for pair in zip(values, before, strict=True)]

    def _factors(self, value: Tensor, before: Sequence[Tensor], memory: Memory) -> list[Tensor]:
        """A value and its differences to the last step in which it was computed."""
        found = [value]
        for previous in before[: self.order]:
            assert memory.last is not None
            found.append((found[-1] - previous.to(value.dtype)) / (memory.step - memory.last))
        return found if self.dtype is None else [factor.to(self.dtype) for factor in found]

    def _predicted(self, path: str, memory: Memory) -> list[Tensor]:
        assert memory.last is not None
        if not self.modules[path]:
            return [like.new_zeros(shape) for like, shape in memory.like[path]]
        offset, found = memory.step - memory.last, []
        for factors, (like, shape) in zip(memory.factors[path], memory.like[path], strict=True):
            value = like.new_zeros(shape)
            for order, factor in enumerate(factors):
                value = value + factor.to(like.dtype) * (offset**order / math.factorial(order))
            found.append(value)
        return found


def _fits(patterns: Sequence[str], name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)
