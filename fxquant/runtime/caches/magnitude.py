"""MagCache: all blocks are skipped while the known change in the size of what they add stays small."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from fxquant.runtime.caches.blocks import Block, Blocks, cut_blocks
from fxquant.runtime.caches.cutting import Run

log = logging.getLogger(__name__)


@dataclass
class Memory:
    """What the steps of a generation left.

    Attributes:
        step: Number of steps so far.
        added: What the blocks added to the image in the last step in which they ran.
        ratio: Product of the ratios since then.
        error: Sum of the deviations of that product from 1.
        skipped: Number of steps since then.
        found: The ratios that were measured.
    """

    step: int = 0
    added: Tensor | None = None
    ratio: Any = 1.0
    error: Any = 0.0
    skipped: int = 0
    found: list[float] = field(default_factory=list)

    def compute_next(self) -> None:
        """Begin to count anew."""
        self.ratio, self.error, self.skipped = 1.0, 0.0, 0


@dataclass(frozen=True)
class Magnitude:
    """``MagCacheConfig`` of diffusers, with its arithmetic.

    Attributes:
        threshold: Blocks run if the accumulated error is larger.
        most_skipped: Blocks run after this number of steps without them.
        first_steps: Number of steps in which the blocks always run.
        steps: Number of steps of a generation.
        ratios: For each step, the size of what the blocks add relative to the step before, on the CPU; None to measure
            and to log them.
        blocks: The blocks of the model.
    """

    threshold: float
    most_skipped: int
    first_steps: int
    steps: int
    ratios: Tensor | None
    blocks: Sequence[Block]

    needs_context: ClassVar[bool] = False

    def cut(self, module: fx.GraphModule) -> Blocks:
        """Cut a graph before the first block."""
        return cut_blocks(module, self.blocks, behind_first=False)

    def memory(self) -> Memory:
        """What is known before the first step."""
        return Memory()

    def run(self, parts: Blocks, inputs: Sequence[Any], memory: Memory, run: Run) -> tuple[Any, bool]:
        """The outputs of a graph, and whether blocks were skipped."""
        values = dict(zip(parts.cut.inputs, inputs, strict=True))
        values |= parts.cut.head.run(values, run)
        skips = self._skips(memory)
        if skips:
            for number, (source, result) in enumerate(parts.streams):  # The text passes unchanged, as in diffusers.
                values[result] = values[source] if number else values[source] + memory.added
            if parts.between:
                values[parts.streams[0][1]] = values[parts.streams[0][1]] + parts.total(values)[0]
        else:
            values |= parts.cut.middle.run(values, run)
            added = parts.reused(values)[0]
            if self.ratios is None:
                memory.found.append(_ratio(added, memory.added))
            memory.added = added
        self._advance(memory)
        return parts.cut.leaves(values, run), skips

    def _skips(self, memory: Memory) -> bool:
        if self.ratios is None or memory.step < self.first_steps:
            return False
        memory.ratio *= self.ratios[memory.step] if memory.step < len(self.ratios) else 1.0
        memory.skipped += 1
        memory.error += abs(1.0 - memory.ratio)
        if memory.added is None or memory.error > self.threshold or memory.skipped > self.most_skipped:
            memory.compute_next()
            return False
        return True

    def _advance(self, memory: Memory) -> None:
        memory.step += 1
        if memory.step >= self.steps:
            if self.ratios is None:
                log.warning("measured for MagCacheConfig(mag_ratios=...): %s", memory.found)
            memory.step, memory.added, memory.found = 0, None, []
            memory.compute_next()


def _ratio(added: Tensor, before: Tensor | None) -> float:
    """The mean over tokens of the length of what was added, relative to the step before; 1 for the first step."""
    if before is None:
        return 1.0
    now, then = (torch.linalg.norm(value.float(), dim=-1) for value in (added, before))
    return float((now / (then + 1e-8)).mean())
