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
        threshold: The other blocks are skipped unless the mean absolute change of what the first block adds, relative
            to the mean absolute value of what it added in the last full step, is larger.
    """

    threshold: float

    needs_context: ClassVar[bool] = True

    def cut(self, module: fx.GraphModule, blocks: Sequence[Block]) -> Blocks:
        """Cut a graph behind the first block."""
        return cut_blocks(module, blocks, behind_first=True)

    def memory(self) -> Memory:
        """What is known before the first step."""
        return Memory()

    def run(self, parts: Blocks, inputs: Sequence[Any], memory: Memory, run: Run) -> tuple[Any, ...]:
        """The outputs of a graph."""
        values = dict(zip(parts.cut.inputs, inputs, strict=True))
        values |= parts.cut.head.run(values, run)
        added = (values[parts.streams[0][0]] - values[parts.received]).detach()
        if self._is_like(added, memory.first):
            for (source, result), other in zip(parts.streams, memory.others, strict=True):
                values[result] = other + values[source]
        else:
            values |= parts.cut.middle.run(values, run)
            memory.first = added
            memory.others = [(values[result] - values[source]).detach() for source, result in parts.streams]
        return parts.cut.leaves(values, run)

    def _is_like(self, added: Tensor, before: Tensor | None) -> bool:
        if before is None:
            return False
        change = (added - before).abs().mean() / before.abs().mean()
        return not change.item() > self.threshold  # Like diffusers also where nothing was added in either step: NaN.
