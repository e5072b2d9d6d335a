"""The rules by which caches skip: one for each config of diffusers that works on graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import fx, nn

from fxquant.errors import ConfigurationError
from fxquant.runtime.caches.blocks import blocks_of
from fxquant.runtime.caches.broadcast import Broadcast
from fxquant.runtime.caches.checks import check_fields
from fxquant.runtime.caches.cutting import Run
from fxquant.runtime.caches.first_block import FirstBlock
from fxquant.runtime.caches.magnitude import Magnitude
from fxquant.runtime.caches.taylor import Taylor


class Rule(Protocol):
    """Decides in each step what is skipped.

    Attributes:
        needs_context: Whether models whose pipelines set ``cache_context`` have to be called within one.
    """

    @property
    def needs_context(self) -> bool: ...  # noqa: D102

    def cut(self, module: fx.GraphModule) -> Any:
        """Cut a graph."""
        ...

    def memory(self) -> Any:
        """What is known before the first step of a generation."""
        ...

    def run(self, parts: Any, inputs: Sequence[Any], memory: Any, run: Run) -> tuple[Any, bool]:
        """The outputs of a graph, and whether blocks were skipped."""
        ...


def rule_of(config: Any, model: nn.Module) -> Rule:
    """What a config of diffusers asks for.

    Args:
        config: The config.
        model: The original without weights.

    Raises:
        ConfigurationError: If it is none of those that work on graphs, or the model has nothing that it would skip.
    """
    from diffusers import hooks

    if isinstance(config, hooks.FirstBlockCacheConfig):
        check_fields(config, "FirstBlockCacheConfig")
        return FirstBlock(float(config.threshold), blocks_of(model))
    if isinstance(config, hooks.MagCacheConfig):
        check_fields(config, "MagCacheConfig")
        ratios = None if config.calibrate or config.mag_ratios is None else config.mag_ratios.detach().cpu().clone()
        steps = config.num_inference_steps
        first = int(config.retention_ratio * steps + 0.5)
        return Magnitude(config.threshold, config.max_skip_steps, first, steps, ratios, blocks_of(model))
    if isinstance(config, hooks.TaylorSeerCacheConfig):
        check_fields(config, "TaylorSeerCacheConfig")
        return Taylor.of(config, model)
    if isinstance(config, hooks.PyramidAttentionBroadcastConfig):
        check_fields(config, "PyramidAttentionBroadcastConfig")
        return Broadcast.of(config, model)
    known = (
        "FirstBlockCacheConfig(threshold=0.05), MagCacheConfig, TaylorSeerCacheConfig and "
        "PyramidAttentionBroadcastConfig of diffusers"
    )
    if not type(config).__module__.startswith("diffusers.hooks."):
        what = config.__name__ + " itself" if isinstance(config, type) else f"a {type(config).__name__}"
        raise ConfigurationError(f"enable_cache takes the config of a cache, not {what}. These work: {known}")
    raise ConfigurationError(
        f"{type(config).__name__} does not work on a captured model: it changes how modules compute, and a graph has "
        f"no modules. Those that skip blocks or modules work: {known}"
    )
