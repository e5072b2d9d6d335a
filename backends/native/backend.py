"""The backend: which layers it runs, which it refuses, and the names of its kernels."""

from __future__ import annotations

import copy
import enum
import warnings
from collections.abc import Collection, Mapping
from typing import ClassVar

import torch
from torch import Tensor, fx

from fxquant.backends import onednn_products
from fxquant.backends.native import compiled, gpu, library, machine, onednn
from fxquant.backends.native.gpu import machine as gpus
from fxquant.backends.native.onednn import weights
from fxquant.errors import BackendError, SpeedWarning
from fxquant.ir.stages import SPECS, Stage, StageSpec
from fxquant.numerics.formats import INTEGERS, is_integer
from fxquant.pipeline.backend import Backend
from fxquant.planning.decisions import AttentionPlan, LayerPlan
from fxquant.planning.plan import Plan

_ELSE = "use backend 'fake-quant'"


class Kernels(enum.Enum):
    """The set of kernels that runs."""

    AUTO = "auto"
    COMPILED = "compiled"
    ONEDNN = "onednn"
    TRITON = "triton"


class Native(Backend):
    """Runs quantized models on x86 CPUs and NVIDIA GPUs as integer products.

    There are three sets of kernels. GPUs run fxquant's own *Triton* kernels. CPUs run fxquant's own *compiled* kernels
    in C++, which need AVX-512 with VNNI and a compiler. The compiled kernels also compute attention, and the ops around
    the products are fused into them. Other CPUs, and CPUs with tiles (AMX), run the products of oneDNN.

    Args:
        kernels: ``auto``, ``compiled``, ``onednn`` or ``triton``. CPUs run ``triton`` only in Triton's interpreter.
        packed: Keep weights of up to 4 bits in half a byte each, if the kernels can.
        attention: ``bf16`` multiplies attention that the plan leaves float in bfloat16, if the compiled kernels can;
            ``float`` leaves it to ATen, as on GPUs.
        branches: ``bf16`` multiplies branches of low rank in bfloat16, if the compiled kernels can, with float32 sums;
            ``float`` multiplies them in float32; ``separate`` leaves each branch an op of its own, in the wider of the
            dtypes of its input and its factors.
        device: The device of the models, which decides the kernels; :func:`fxquant.compile` and :func:`fxquant.load`
            set it themselves.

    Raises:
        BackendError: If the requested kernels are not available; the message says why.
    """

    name: ClassVar[str] = "native"
    spec: ClassVar[StageSpec] = StageSpec(
        "lowered to native",
        SPECS[Stage.QUANTIZED].ops - {"quantize", "linear"},
        frozenset({"aten", "fxquant_native"}),
    )
    devices: ClassVar[frozenset[str] | None] = frozenset({"cpu", "cuda"})
    moves: ClassVar[bool] = False

    def __init__(
        self,
        kernels: str = "auto",
        packed: bool = True,
        attention: str = "bf16",
        device: torch.device | str = "cpu",
        branches: str = "bf16",
    ) -> None:
        try:
            self._asked = Kernels(kernels)
        except ValueError:
            raise BackendError(f"kernels={kernels!r} is not known; choose auto, compiled, onednn or triton") from None
        if attention not in ("bf16", "float"):
            raise BackendError(f"attention={attention!r} is not known; choose bf16 or float")
        if branches not in ("bf16", "float", "separate"):
            raise BackendError(f"branches={branches!r} is not known; choose bf16, float or separate")
        self._packed = packed
        self._bf16_attention = attention == "bf16"
        self._branches = branches
        self._device = torch.device(device)

    def on(self, device: torch.device) -> Native:
        """This backend, with the kernels of the device."""
        made = copy.copy(self)
        made._device = device
        return made

    def check_device(self, device: torch.device) -> None:
        """Also refuse devices that have no kernels."""
        super().check_device(device)
        _ = self.on(device).kernels

    def describe(self, device: torch.device) -> str:
        """The kernels of a device, and why the faster ones do not run."""
        chosen = self.on(device).kernels
        if chosen is Kernels.TRITON:
            reason = gpus.missing(device, fp8=True)
            blocks = ", ".join(sorted(gpus.block_formats(device)))
            known = f" and fp8{', and torch products of ' + blocks if blocks else ''}"
            return "runs Triton kernels for int8" + (known if reason is None else f"; not for fp8: {reason}")
        if chosen is Kernels.COMPILED:
            bf16 = "bfloat16 products" if machine.has_bf16_products() else "float32 (no AVX-512 BF16)"
            return f"runs compiled kernels ({_own().title}), attention in {bf16}"
        if machine.has_tiles():
            return "runs the products of oneDNN (AMX tiles)"
        return f"runs the products of oneDNN; not the compiled kernels, because {machine.missing_kernels()}"

    @property
    def kernels(self) -> Kernels:
        """Which kernels run: never :attr:`Kernels.AUTO`."""
        if self._asked is Kernels.TRITON or (self._asked is Kernels.AUTO and self._device.type == "cuda"):
            reason = gpus.missing(self._device)
            if reason is not None:
                raise BackendError(f"backend 'native' cannot run: {reason}")
            return Kernels.TRITON
        if self._device.type == "cuda":
            raise BackendError(f"kernels={self._asked.value!r} run on CPUs, and the model is on {self._device}")
        if self._asked is Kernels.ONEDNN or (self._asked is Kernels.AUTO and machine.has_tiles()):
            return Kernels.ONEDNN
        reason = machine.missing_kernels()
        if reason is None:
            return Kernels.COMPILED
        if self._asked is Kernels.COMPILED:
            raise BackendError(f"there are no compiled kernels: {reason}; or use kernels='onednn'")
        return Kernels.ONEDNN

    def product_formats(self) -> frozenset[str]:
        """Integers, and on GPUs that multiply them ``fp8``, ``mxfp8``, ``mxfp4`` and ``nvfp4``."""
        if self.kernels is not Kernels.TRITON:
            return INTEGERS
        floats = {"fp8"} if gpus.missing(self._device, fp8=True) is None else set()
        return INTEGERS | floats | gpus.block_formats(self._device)

    def refuse(self, layer: LayerPlan) -> str | None:
        """Refuse weight groups that the kernels lack, sums of more than 32 bits, and builds without the kernels."""
        if layer.weight_bits is None or layer.activation_bits is None:
            return None
        if layer.kind != "linear":
            if "fp8" in (layer.weight_format, layer.activation_format):
                return f"it multiplies convolutions in integers only; choose w8a8 for it, or {_ELSE}"
            return None
        kernels = self.kernels
        if kernels is Kernels.TRITON:
            return gpu.refuse(layer)
        own = kernels is Kernels.COMPILED
        if not own and not onednn_products.has_kernels():
            return f"this build of torch has no oneDNN quantized linear; install a CPU build for x86, or {_ELSE}"
        if layer.group_size and not own:
            return (
                f"its weight has one grid per {layer.group_size} input channels, and integer sums of oneDNN run over "
                f"all; leave out the groups (w4a8 in place of w4a8-g{layer.group_size}), or {_ELSE}"
            )
        if not compiled.sums_groups(layer.group_size):
            return (
                f"its weight has one grid per {layer.group_size} input channels, and the kernels add up four channels "
                f"at a time; choose a group size that is a multiple of 4, or {_ELSE}"
            )
        if layer.shape[1] > (compiled.MAX_FEATURES if own else onednn.MAX_FEATURES):
            return f"sums over {layer.shape[1]} inputs do not fit 32 bits; keep the layer float, or {_ELSE}"
        return None

    def lower(self, module: fx.GraphModule, plan: Plan, others: Mapping[str, Tensor]) -> None:
        """Lower linears and attention, with the ops around them, to the kernels."""
        if self.kernels is Kernels.TRITON:
            gpu.lower(module, others, gpu.Options(self._packed, self._branches != "separate"))
            return
        if self.kernels is Kernels.COMPILED:
            bf16 = self._branches == "bf16" and machine.has_bf16_products()
            fused = self._branches != "separate"
            compiled.lower(module, others, compiled.Options(self._packed, self._uses_bf16(), bf16, fused))
            return
        if self._asked is Kernels.AUTO and not machine.has_tiles():
            _tell_what_is_lost()
        onednn.lower(module, others)

    def stored(self, module: fx.GraphModule) -> dict[str, Tensor]:
        """Packed codes in place of the kernels' weights."""
        if self.kernels is Kernels.TRITON:
            return gpu.stored(module)
        return compiled.stored(module) if self.kernels is Kernels.COMPILED else onednn.stored(module)

    def to_plain(self, tensor: Tensor) -> Tensor:
        """The bytes of a prepacked weight."""
        return tensor if tensor.layout is torch.strided else weights.to_bytes(tensor)

    def from_plain(self, tensor: Tensor) -> Tensor:
        """A prepacked weight of these bytes."""
        return weights.from_bytes(tensor)

    def make_ready(self, ops: Collection[str]) -> None:
        """Load the compiled kernels, and build them if needed, if a graph has ops that only these kernels run."""
        if not library.BUILT.isdisjoint(ops):
            reason = machine.missing_kernels()
            if reason is not None:
                raise BackendError(f"the package needs compiled kernels, and there are none here: {reason}")
            if any("::bf16_attention" in op for op in ops) and not machine.has_bf16_products():
                raise BackendError(
                    "the package multiplies attention in bfloat16, and this processor has no AVX-512 BF16; export the "
                    "model here, or with backend='native{attention=float,branches=float}'"
                )
        super().make_ready(ops)

    def kernel(self, layer: LayerPlan) -> str:
        """The kernel that multiplies, or the reference op."""
        if layer.weight_bits is None:
            return "aten float"
        kernels = self.kernels
        if kernels is Kernels.TRITON and layer.kind == "linear" and layer.activation_bits is not None:
            return gpu.kernel(layer, gpu.Options(self._packed))
        own = kernels is Kernels.COMPILED
        if layer.activation_bits is None:
            if layer.kind == "linear" and layer.group_rows == 1:
                assert layer.format_of_weight is not None
                if own and compiled.fits(layer.format_of_weight.name, layer.group_size):
                    return f"native weight-only {self._weight(layer)}, float32 sums"
                if kernels is Kernels.TRITON:
                    return gpu.weight_only_kernel(layer, gpu.Options(self._packed))
            return "dequantize + aten float"
        if layer.kind == "conv":
            return "fxquant::conv2d (reference, float)"
        if own:
            return f"native {_own().short} u8 x {self._weight(layer)}"
        return "onednn qlinear u8 x s8" + ("" if onednn_products.sums_exactly() else ", in two halves (no VNNI)")

    def attention_kernel(self, attention: AttentionPlan) -> str:
        """The kernel of the products, or the reference op."""
        kernels = self.kernels
        if kernels is Kernels.TRITON and attention.bits is not None:
            return "native triton attention s8 x s8"
        if kernels is not Kernels.COMPILED:
            return "aten float" if attention.bits is None else "fxquant::matmul (reference)"
        if attention.bits is not None:
            return f"native {_own().short} attention u8 x s8"
        return "native attention, bf16 products" if self._uses_bf16() else "aten float"

    def _weight(self, layer: LayerPlan) -> str:
        format = layer.format_of_weight
        assert layer.weight_bits is not None and format is not None
        if not is_integer(format.name):
            return format.name
        halves = compiled.in_halves(layer.weight_bits, self._packed, layer.group_size)
        groups = f" in groups of {layer.group_size}" if layer.group_size and layer.activation_bits is not None else ""
        return ("u4" if halves else "s8") + groups

    def _uses_bf16(self) -> bool:
        return self._bf16_attention and machine.has_bf16_products()


def _own() -> machine.Instructions:
    """The instructions of the compiled kernels, where these run."""
    found = machine.instructions()
    assert found is not None
    return found


def _tell_what_is_lost() -> None:
    reason = machine.missing_kernels()
    lost = f"The fastest kernels are not used, because {reason}. Results are correct; oneDNN and ATen run the model"
    if onednn_products.has_kernels() and not onednn_products.sums_exactly():
        lost += (
            ", and without VNNI instructions every integer product is computed in two halves, at half the speed; "
            "float may be as fast"
        )
    warnings.warn(lost, SpeedWarning, stacklevel=3)
