"""The backend: what it runs, what it refuses, and what it calls what it runs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, fx

from fxquant.backend import Backend
from fxquant.backends.native import lowering
from fxquant.backends.native.machine import has_kernels, sums_exactly
from fxquant.backends.native.weights import MAX_FEATURES
from fxquant.errors import SpeedWarning
from fxquant.ir.stages import SPECS, Stage, StageSpec
from fxquant.plan import AttentionPlan, LayerPlan, Plan

_ELSE = "use backend 'fake-quant'"


class Native(Backend):
    """Runs linears as integer products of oneDNN on x86 CPUs.

    Convolutions, the products of quantized attention and weights behind float activations run as on ``fake-quant``, and
    the report says so.
    """

    name: ClassVar[str] = "native"
    spec: ClassVar[StageSpec] = StageSpec(
        "lowered to native",
        SPECS[Stage.QUANTIZED].ops - {"quantize", "linear"},
        frozenset({"aten", "fxquant_native"}),
    )
    devices: ClassVar[frozenset[str] | None] = frozenset({"cpu"})

    def refuse(self, layer: LayerPlan) -> str | None:
        """Weight groups, sums of more than 32 bits, and a torch that lacks the kernels."""
        if layer.weight_bits is None or layer.activation_bits is None or layer.kind != "linear":
            return None
        if not has_kernels():
            return f"this build of torch has no oneDNN quantized linear; install a CPU build for x86, or {_ELSE}"
        if layer.group_size:
            return (
                f"its weight has a grid for every {layer.group_size} input channels, and integer sums run over all; "
                f"leave out the groups (w4a8 in place of w4a8-g{layer.group_size}), or {_ELSE}"
            )
        if layer.shape[1] > MAX_FEATURES:
            return f"sums over {layer.shape[1]} inputs do not fit 32 bits; keep the layer float, or {_ELSE}"
        return None

    def lower(self, module: fx.GraphModule, plan: Plan, held: Mapping[str, Tensor]) -> None:
        """Linears to integer products; quantization of what they read to ops that fuse."""
        if has_kernels() and not sums_exactly():
            warnings.warn(
                "this processor has no VNNI instructions, or ONEDNN_MAX_CPU_ISA forbids them. Results are right, but "
                "every integer product is made in two halves, at half the speed; float may be as fast",
                SpeedWarning,
                stacklevel=2,
            )
        lowering.lower(module, held)

    def stored(self, module: fx.GraphModule) -> dict[str, Tensor]:
        """Packed codes in place of the kernels' weights."""
        return lowering.stored(module)

    def kernel(self, layer: LayerPlan) -> str:
        """The kernel of oneDNN, or the reference op."""
        if layer.weight_bits is None:
            return "aten float"
        if layer.activation_bits is None:
            return "dequantize + aten float"
        if layer.kind == "conv":
            return "fxquant::conv2d (reference, float)"
        return "onednn qlinear u8 x s8" + ("" if sums_exactly() else ", in two halves (no VNNI)")

    def attention_kernel(self, attention: AttentionPlan) -> str:
        """The reference op."""
        return "aten float" if attention.bits is None else "fxquant::matmul (reference, float)"
