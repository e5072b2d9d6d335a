"""The first-block cache: the other blocks run only if the first one changed its input differently than before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, fx

from fxquant.runtime.caches.blocks import Block, Blocks, cut_blocks
from fxquant.runtime.caches.cutting import Run


@dataclass
class Memory:
    """What the last step left in which all blocks ran.

    Attributes:
        first: What the first block added to the image.
        others: What the other blocks added, for each stream.
    """

    first: Tensor | None = None
    others: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class FirstBlock:
    """``FirstBlockCacheConfig`` of diffusers, with its arithmetic.

    Attributes:
        threshold: The other blocks are skipped unless what the first block adds changed by more: the mean absolute
            change since the last full step, relative to the mean absolute value then.
        blocks: The blocks of the model.
    """

    threshold: float
    blocks: Sequence[Block]

    needs_context: ClassVar[bool] = True

    def cut(self, module: fx.GraphModule) -> Blocks:
        """Cut a graph behind the first block."""
        return cut_blocks(module, self.blocks, behind_first=True)

    def memory(self) -> Memory:
        """What is known before the first step."""
        return Memory()

    def run(self, parts: Blocks, inputs: Sequence[Any], memory: Memory, run: Run) -> tuple[Any, bool]:
        """The outputs of a graph, and whether blocks were skipped."""
        values = dict(zip(parts.cut.inputs, inputs, strict=True))
        values |= parts.cut.head.run(values, run)
        added = (values[parts.streams[0][0]] - values[parts.received]).detach()
        skips = self._is_like(added, memory.first)
        if skips:
            for (source, result), other, now in zip(parts.streams, memory.others, parts.total(values), strict=True):
                values[result] = other + values[source] if now is None else other + values[source] + now
        else:
            values |= parts.cut.middle.run(values, run)
            memory.first = added
            memory.others = parts.reused(values)
        return parts.cut.leaves(values, run), skips

    def _is_like(self, added: Tensor, before: Tensor | None) -> bool:
        if before is None:
            return False
        change = (added - before).abs().mean() / before.abs().mean()
        return not change.item() > self.threshold  # Like diffusers also where nothing was added in either step: NaN.
