"""The backend: which layers it runs, which it refuses, and the names of its kernels."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from fxquant.backends.torchao import parts, weights
from fxquant.backends.torchao.tensors import stored
from fxquant.errors import BackendError, SpeedWarning
from fxquant.ir.stages import SPECS, Stage, StageSpec
from fxquant.numerics.formats import INTEGERS
from fxquant.pipeline.backend import Backend
from fxquant.planning.decisions import LayerPlan
from fxquant.planning.plan import Plan

_ELSE = "use backend 'fake-quant'"
_FP8 = "fp8"


class TorchAO(Backend):
    """Runs layers by torchao's fusions for x86 and by the products of its tensor subclasses.

    Compile the model with ``model.compile()``, which freezes weights as the fusions need. In a model that is not
    compiled, static layers dequantize their weights on each call.

    Args:
        device: The device of the models, which decides the number formats; :func:`fxquant.compile` and
            :func:`fxquant.load` set it themselves.
    """

    name: ClassVar[str] = "torchao"
    spec: ClassVar[StageSpec] = StageSpec(
        "lowered to torchao",
        SPECS[Stage.QUANTIZED].ops - {"quantize", "linear", "matmul"},
        frozenset({"aten", "quantized_decomposed", "fxquant_torchao"}),
    )
    devices: ClassVar[frozenset[str] | None] = frozenset({"cpu", "cuda"})
    moves: ClassVar[bool] = False

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)

    def on(self, device: torch.device) -> TorchAO:
        """This backend, with the products of the device."""
        made = copy.copy(self)
        made._device = device
        return made

    def product_formats(self) -> frozenset[str]:
        """Integers, and where torch multiplies 8-bit floats ``fp8``."""
        return INTEGERS | {_FP8} if parts.without_floats(self._device) is None else INTEGERS

    def refuse(self, layer: LayerPlan) -> str | None:
        """Refuse layers that no kernel takes, and all quantized layers if torchao is missing."""
        if layer.weight_bits is None:
            return None
        reason = parts.missing()
        if reason is not None:
            return f"{reason}, or {_ELSE}"
        if layer.activation_bits is None:
            return _refuse_storage(layer) if layer.kind == "linear" else None
        if _FP8 in (layer.weight_format, layer.activation_format):
            return _refuse_floats(layer)
        if layer.group_size:
            return (
                f"its weight has one grid per {layer.group_size} input channels, and integer sums run over all; "
                f"leave out the groups (w4a8 in place of w4a8-g{layer.group_size}), or {_ELSE}"
            )
        if layer.shape[1] > weights.MAX_FEATURES:
            return f"sums over {layer.shape[1]} inputs do not fit 32 bits; keep the layer float, or {_ELSE}"
        return None if torch.cuda.is_available() else parts.unfit()

    def lower(self, module: fx.GraphModule, plan: Plan, others: Mapping[str, Tensor]) -> None:
        """Lower to the ops that torchao's fusions know and to the ops that its tensor subclasses run."""
        parts.register_fusions()
        from fxquant.backends.torchao.lowering import Lowering  # It names ops that torchao defines.

        on_cpu = any(node.op == "get_attr" and node.meta["val"].device.type == "cpu" for node in module.graph.nodes)
        integer = [
            name
            for name, layer in plan.layers.items()
            if layer.activation_bits is not None and layer.weight_format != _FP8
        ]
        reason = parts.unfit()
        if on_cpu and integer and reason is not None:
            raise BackendError(f"backend 'torchao' cannot run {', '.join(integer[:3])} ...: {reason}")
        lowering = Lowering(module, others)
        lowering.run()
        if lowering.slow:
            value = lowering.slow[0].meta["val"]
            warnings.warn(
                f"{len(lowering.slow)} layers with weights in groups dequantize them on each call, because their "
                f"kernel does not support {value.dtype} on {value.device.type}; convert the model to bfloat16 first",
                SpeedWarning,
                stacklevel=2,
            )

    def stored(self, module: fx.GraphModule) -> dict[str, Tensor]:
        """Packed codes in place of the kernels' weights."""
        return stored(module)

    def kernel(self, layer: LayerPlan) -> str:
        """The kernel of the compiled model, and the kernel that runs otherwise if it is another one."""
        if layer.weight_bits is None:
            return "aten float"
        if layer.activation_bits is None:
            return _storage_kernel(layer)
        if layer.weight_format == _FP8:
            return "torch scaled_mm e4m3 x e4m3"
        dynamic = layer.activation is not None and layer.activation.method == "dynamic"
        if layer.kind == "conv" and layer.boundaries:
            return "fxquant::conv2d (reference, float)"
        if dynamic or layer.boundaries:
            return "_int_mm, rows scaled behind it; compiled and frozen: onednn qlinear u8 x s8"
        if layer.kind == "conv":
            return (
                "onednn qconv u8 x s8 where compiled and frozen, else aten float; on CUDA fxquant::conv2d (reference)"
            )
        return "onednn qlinear u8 x s8 where compiled and frozen, else dequantize + aten float; on CUDA _int_mm"

    def describe(self, device: torch.device) -> str:
        """Whether torchao is installed, and whether the processor has its integer products."""
        reason = parts.missing()
        if reason is not None:
            raise BackendError(reason)
        reason = parts.unfit() if device.type == "cpu" else None
        lacks = parts.without_floats(device)
        floats = "products of fp8" if lacks is None else f"no products of fp8, because {lacks}"
        if reason is None:
            return f"runs integer products and weight-only layers; {floats}"
        return f"runs weight-only layers; no integer products, because {reason}; {floats}"

    def compiling(self) -> None:
        """Warn if weights are not frozen, because then nothing is fused."""
        _warn_if_not_frozen()

    def compiling_blocks(self) -> None:
        """Warn that weights of blocks are inputs and cannot be frozen."""
        if not torch.cuda.is_available():
            warnings.warn(
                "torchao's fusions for CPUs need frozen weights, and the weights of blocks that are compiled once are "
                "inputs: layers with static ranges will dequantize their weights in each call. Call model.compile() "
                "instead, or use backend 'native'",
                SpeedWarning,
                stacklevel=3,
            )

    def with_tensors(self) -> Mapping[Any, tuple[Any, tuple[int, ...]]]:
        """The ops that hold the scale and the zero point of a static range."""
        parts.register_fusions()
        ops, own, grid = torch.ops.quantized_decomposed, torch.ops.fxquant_torchao, (1, 2)
        return {
            ops.quantize_per_tensor.default: (ops.quantize_per_tensor.tensor, grid),
            ops.dequantize_per_tensor.default: (ops.dequantize_per_tensor.tensor, grid),
            own.input_sums.default: (own.input_sums_of_grid.default, grid),
        }

    def settings(self) -> contextlib.AbstractContextManager[object]:
        """Freeze weights, which the fusions need, and disable gradients, which keep inductor from freezing."""
        import torch._inductor.config

        stack = contextlib.ExitStack()
        stack.enter_context(torch._inductor.config.patch(freezing=True))
        stack.enter_context(torch.no_grad())
        return stack


@torch.compiler.assume_constant_result
def _warn_if_not_frozen() -> None:
    import torch._inductor.config

    if torch.compiler.is_exporting() or (torch._inductor.config.freezing and not torch.is_grad_enabled()):
        return
    warnings.warn(
        "weights are not frozen while this model is compiled, and torchao's fusions need frozen weights: each call "
        "will dequantize all weights. Call model.compile() in place of torch.compile(model), or set "
        "torch._inductor.config.freezing = True and compile and run under torch.no_grad(); the option freezing of "
        "torch.compile takes effect too late",
        SpeedWarning,
        stacklevel=2,
    )


def _refuse_floats(layer: LayerPlan) -> str | None:
    """Why no product takes a layer of which one side is ``fp8``, or None."""
    formats = layer.weight_format, layer.activation_format
    if layer.kind != "linear":
        return f"it multiplies convolutions in integers only; choose w8a8 for it, or {_ELSE}"
    if formats != (_FP8, _FP8):
        known = [
            name or f"int{bits}" for name, bits in zip(formats, (layer.weight_bits, layer.activation_bits), strict=True)
        ]
        return f"it multiplies fp8 by fp8, not {known[1]} by {known[0]}; choose wfp8afp8, or {_ELSE}"
    if layer.group_size:
        return f"it takes one fp8 scale per output channel, not per group; choose wfp8afp8 without -g, or {_ELSE}"
    return None


def _refuse_storage(layer: LayerPlan) -> str | None:
    """Why no kernel takes weights in groups with float activations, or None. All weights without groups run."""
    if not layer.group_size:
        return None
    if layer.weight_bits is not None and layer.weight_bits > 4:
        return (
            f"its kernels for weights in groups take at most 4 bits, not {layer.weight_bits}; leave out the groups, "
            f"use 4 bits or fewer, or {_ELSE}"
        )
    shape = layer.shape[0], layer.shape[1]
    if all(weights.group_of_four_bits(*shape, layer.group_size, device) is None for device in ("cpu", "cuda")):
        return (
            f"its 4-bit kernel takes groups of a multiple of 32 inputs and a multiple of 16 outputs, not groups of "
            f"{layer.group_size} and {layer.shape[0]} outputs; use such groups (-g32, -g64) or none, or {_ELSE}"
        )
    return None


def _storage_kernel(layer: LayerPlan) -> str:
    if layer.kind != "linear":
        return "dequantize + aten float"
    four = layer.weight_bits is not None and layer.weight_bits <= 4
    if four and weights.group_of_four_bits(layer.shape[0], layer.shape[1], layer.group_size, "cpu") is not None:
        return "aten _weight_int4pack_mm in 16-bit floats; dequantize + aten float in others"
    if weights.fits_byte_kernel(layer.shape[1]):
        return "aten _weight_int8pack_mm in 16-bit floats; dequantize + aten float in others"
    return "dequantize + aten float"
