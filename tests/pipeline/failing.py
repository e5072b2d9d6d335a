"""A registered pass that fails, for tests of reproducers, which import it by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxquant.ir.rewriter import Rewriter
from fxquant.ir.stages import Stage
from fxquant.pipeline.pipeline import Pass, Tier, register_pass
from fxquant.planning.context import PassContext


@register_pass
@dataclass(frozen=True)
class FailsAt(Pass):
    """Fails at the first node whose name ends so."""

    name: ClassVar[str] = "test-fails-at"
    tier: ClassVar[Tier] = Tier.EXACT
    requires: ClassVar[Stage] = Stage.QUANTIZED
    establishes: ClassVar[Stage] = Stage.CAPTURED
    ending: str = "_codes"

    def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
        for node in graph.nodes:
            if node.name.endswith(self.ending):
                raise ZeroDivisionError(f"at {node.name}")
