"""``enable_cache`` and what belongs to it, for models that are graphs."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from fxquant.capture.graph import CapturedGraph
from fxquant.capture.trace import Architecture
from fxquant.errors import ConfigurationError
from fxquant.runtime.caches.cutting import Run
from fxquant.runtime.caches.rules import rule_of
from fxquant.runtime.caches.state import Context, States, kind_of

if TYPE_CHECKING:
    from fxquant.runtime.compiling import InPieces

log = logging.getLogger(__name__)


class StepCache:
    """A cache that is enabled: how graphs are cut, and what is kept from step to step.

    Attributes:
        config: The config of diffusers.
        states: What is kept, by thread.
        calls: Number of calls since it was enabled.
        skipped: Number of those that skipped blocks.

    Args:
        config: The config of diffusers.
        model: The original without weights.
        timestep: Name of the input that holds the timestep, or None.

    Raises:
        ConfigurationError: If fxquant has no such cache, or the model has no blocks.
    """

    def __init__(self, config: Any, model: nn.Module, timestep: str | None) -> None:
        self.config = config
        self.states = States()
        self.calls = self.skipped = 0
        self._rule = rule_of(config, model)
        self._timestep = timestep
        self._sets_context = hasattr(type(model), "cache_context")
        self._cuts: weakref.WeakKeyDictionary[fx.GraphModule, tuple[Any, Any]] = weakref.WeakKeyDictionary()

    def parts(self, module: fx.GraphModule) -> Any:
        """A graph in parts; made anew if the code of the graph changed.

        Raises:
            ConfigurationError: If it cannot be cut.
        """
        kept = self._cuts.get(module)
        if kept is None or kept[0] is not module._code:
            kept = self._cuts[module] = module._code, self._rule.cut(module)
        return kept[1]

    def run(
        self, captured: CapturedGraph, inputs: Sequence[Any], run: Run, context: str | None = None
    ) -> tuple[Any, ...]:
        """The outputs of a graph.

        Args:
            captured: The graph, with the names of its inputs.
            inputs: Its tensor inputs.
            run: Runs a part of it.
            context: Name of the ``cache_context`` of the call.

        Raises:
            ConfigurationError: If the graph cannot be cut, or the call is in no context of a model that needs one.
        """
        if context is None and self._rule.needs_context and self._sets_context:
            raise ConfigurationError(
                "the model has a cache of steps, and this call is in no cache_context, which keeps calls with a prompt "
                'apart from calls without; write: with model.cache_context("cond"): model(...)'
            )
        parts = self.parts(captured.module)
        named = dict(zip((name for name, _ in captured.call.tensors), inputs, strict=True))
        key = context, kind_of(parts, list(inputs))
        memory = self.states.of(key, named, self._timestep, self._rule.memory)
        try:
            leaves, skipped = self._rule.run(parts, inputs, memory, run)
        except BaseException:  # Memory may have run out; the state is half of this step.
            self.states.reset()
            raise
        self.calls += 1
        self.skipped += skipped
        found: tuple[Any, ...] = leaves
        return found


class Cacheable(nn.Module):
    """The part of a captured model that caches denoising steps."""

    architecture: Architecture
    captured: list[CapturedGraph]
    _cache: StepCache | None = None
    _context: Context
    _pieces: InPieces | None

    @property
    def is_cache_enabled(self) -> bool:
        """Whether steps are cached."""
        return self._cache is not None

    @property
    def cache_counts(self) -> dict[str, int]:
        """Number of ``calls`` since the cache was enabled, and of those that were ``skipped``, that is, in part."""
        cache = self._cache
        return {"calls": 0, "skipped": 0} if cache is None else {"calls": cache.calls, "skipped": cache.skipped}

    @property
    def _cache_config(self) -> Any:
        return None if self._cache is None else self._cache.config

    def enable_cache(self, config: Any) -> None:
        """Skip parts in steps in which they do nearly the same as before, as the method of diffusers does.

        The graphs are cut in parts for this. Nothing of one generation is used in the next, and
        :meth:`disable_cache` returns the model to what it was. Neither checkpoints nor pickles hold the setting.

        Args:
            config: A ``FirstBlockCacheConfig``, ``MagCacheConfig``, ``TaylorSeerCacheConfig`` or
                ``PyramidAttentionBroadcastConfig`` of diffusers.

        Raises:
            ConfigurationError: If a cache is already enabled, the model is compiled as a whole, the cache is another
                one, or a graph cannot be cut. Nothing changed.
        """
        if self._cache is not None:
            raise ConfigurationError(
                f"this model has a cache already, {type(self._cache.config).__name__}; call disable_cache() first"
            )
        if self._compiled_call_impl is not None:
            raise ConfigurationError(
                "this model was compiled as a whole, and compiled code cannot skip blocks. Load it again and enable "
                "the cache without compile(), or with compile_repeated_blocks()"
            )
        made = StepCache(copy.copy(config), self.architecture.skeleton, self.architecture.timestep)
        for captured in self.captured:
            made.parts(captured.module)
        self._cache = made

    def disable_cache(self) -> None:
        """Run all of the graphs in every step again."""
        if self._cache is None:
            log.warning("no cache of steps is enabled, so there is nothing to disable")
        self._cache = None
        if self._pieces is not None:
            self._pieces.forget_parts()

    @contextmanager
    def cache_context(self, name: str, **_: Any) -> Iterator[None]:
        """Keep what is cached in calls within this context apart from calls in contexts of other names.

        Pipelines set it around their calls with and without a prompt. If a call raises an error, what the generation
        left is forgotten.

        Args:
            name: The name, such as ``"cond"``.
        """
        context = self._context
        before, context.name = context.name, name
        try:
            yield
        except BaseException:
            self._reset_stateful_cache()
            raise
        finally:
            context.name = before

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        """Forget what the last generation left; pipelines call it when they end."""
        if self._cache is not None:
            self._cache.states.reset()

    def _copy_cache_to(self, clone: Cacheable) -> None:
        """Give a copy of the model the same cache, empty."""
        if self._cache is not None:
            clone._cache = StepCache(self._cache.config, self.architecture.skeleton, self.architecture.timestep)

    def _run_graph(self, captured: CapturedGraph, inputs: Sequence[Any], run: Run) -> Sequence[Any]:
        """The outputs of a graph, with a cache if one is enabled."""
        if self._cache is None:
            return run(captured.module, inputs)
        return self._cache.run(captured, inputs, run, self._context.name)


def refuse_compiling(model: Cacheable) -> None:
    """Refuse to compile a model with a cache of steps as a whole.

    Raises:
        ConfigurationError: Says what to do instead.
    """
    if model.is_cache_enabled:
        raise ConfigurationError(
            "this model has a cache of steps, which decides in each call what runs, so it cannot be compiled as a "
            "whole. Call model.compile_repeated_blocks(), or disable_cache() first"
        )
