"""Observe one denoising step only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxquant.errors import ConfigurationError
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.stages import Stage
from fxquant.pipeline.pipeline import Pass, Tier, register_pass
from fxquant.planning.context import PassContext


@register_pass
@dataclass(frozen=True)
class ObserveStep(Pass):
    """Take the statistics from one denoising step, as 'An Analysis on Quantizing Diffusion Transformers' does.

    The graph does not change; the plan says which step is observed (single-step sampling, arXiv 2406.11100).
    Calibration runs earlier steps in float without observers, and does not run later steps: these calls of the model
    return the last output again. So the first step costs one forward pass per sample, however many steps the sampler
    makes.

    Attributes:
        step: Number of the step. Step 0 is the first step of the sampler, which gets pure noise.
    """

    name: ClassVar[str] = "observe-step"
    tier: ClassVar[Tier] = Tier.EXACT
    requires: ClassVar[Stage] = Stage.OBSERVED
    establishes: ClassVar[Stage] = Stage.CAPTURED
    keeps_inputs: ClassVar[bool] = True

    step: int = 0

    def __post_init__(self) -> None:
        if self.step < 0:
            raise ConfigurationError(f"observe-step: step {self.step} is negative; choose 0 or more")

    def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
        context.plan.observed_step = self.step
