"""Observe one denoising step, and later steps on inputs that follow from its output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxquant.errors import ConfigurationError
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.stages import Stage
from fxquant.pipeline.pipeline import Pass, Tier, register_pass
from fxquant.planning.context import PassContext
from fxquant.planning.decisions import LayerPlan


@register_pass
@dataclass(frozen=True)
class ObserveStep(Pass):
    """Take the statistics from one denoising step, as 'An Analysis on Quantizing Diffusion Transformers' does.

    The graph does not change; the plan says which step is observed (single-step sampling, arXiv 2406.11100).
    Calibration runs earlier steps in float without observers, and does not run later steps: these calls of the model
    return the last output again. So the first step costs one forward pass per sample, however many steps the sampler
    makes.

    With ``later=n``, n of the later steps are observed as well, evenly spread, among them the last. Each costs one more
    forward pass per sample. Their inputs are those that the sampler made from the output of the observed step. A DDIM
    or Euler sampler that gets the same output in several steps goes where one large step would go; for predicted noise
    the last input is the estimate of the clean sample. So the ranges cover the whole schedule, although the model runs
    a few times only. The last step is known when the sampler has made it, so these calls run when ``calibrate`` returns
    or begins another run.

    Attributes:
        step: Number of the step. Step 0 is the first step of the sampler, which gets pure noise.
        later: Number of later steps that are observed as well; all that there are, if the sampler makes fewer.
    """

    name: ClassVar[str] = "observe-step"
    tier: ClassVar[Tier] = Tier.EXACT
    requires: ClassVar[Stage] = Stage.OBSERVED
    establishes: ClassVar[Stage] = Stage.CAPTURED
    keeps_inputs: ClassVar[bool] = True

    step: int = 0
    later: int = 0

    def __post_init__(self) -> None:
        if self.step < 0:
            raise ConfigurationError(f"observe-step: step {self.step} is negative; choose 0 or more")
        if self.later < 0:
            raise ConfigurationError(f"observe-step: {self.later} later steps are not possible; choose 0 or more")

    def decides(self, name: str, layer: LayerPlan) -> bool:
        """Whether the pass decides which steps a layer is observed in: it decides for all layers."""
        return True

    def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
        context.plan.observed_step, context.plan.later_steps = self.step, self.later
