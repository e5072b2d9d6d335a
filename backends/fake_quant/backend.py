"""The reference backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, fx

from fxquant.ir.stages import SPECS, Stage, StageSpec
from fxquant.pipeline.backend import Backend
from fxquant.planning.decisions import LayerPlan
from fxquant.planning.plan import Plan


class FakeQuant(Backend):
    """Runs the reference ops themselves: lowering does not change the graph."""

    name: ClassVar[str] = "fake-quant"
    spec: ClassVar[StageSpec] = StageSpec(
        "lowered to fake-quant", SPECS[Stage.QUANTIZED].ops, registered=Stage.QUANTIZED
    )

    formats: ClassVar[frozenset[str] | None] = None

    def refuse(self, layer: LayerPlan) -> str | None:
        """Every number format and granularity runs."""
        return None

    def describe(self, device: torch.device) -> str:
        """The reference ops run on every device."""
        return "runs every recipe, with reference ops, in float"

    def lower(self, module: fx.GraphModule, plan: Plan, others: Mapping[str, Tensor]) -> None:
        """Do nothing: the quantized graph is the lowered graph."""

    def kernel(self, layer: LayerPlan) -> str:
        """The reference op of the layer."""
        if layer.weight_bits is None:
            return "aten float"
        if layer.activation_bits is None:
            return "dequantize + aten float"
        return f"fxquant::{'conv2d' if layer.kind == 'conv' else 'linear'} (reference)"
