"""Requirements on torchao and on this machine. torchao is optional: this module imports it on first use."""

from __future__ import annotations

import functools
import importlib.util
import re
from importlib.metadata import PackageNotFoundError, version

import torch
from torch.nn import functional
from torch.nn.functional import ScalingType

from fxquant.backends.onednn_products import has_kernels, sums_exactly
from fxquant.errors import BackendError

OLDEST = (0, 18)
"""The first version of torchao with all fusions that lowered graphs rely on."""

_INSTALL = "pip install 'fxquant[torchao]'"
_ELSE = "use backend 'native', which"
_FAKE = "use backend 'fake-quant'"
_FLOATS = (8, 9)  # The lowest compute capability with products of 8-bit floats.
_BY_ROW = ScalingType.RowWise


@functools.cache
def missing() -> str | None:
    """Why torchao cannot be used and what to do, or None if it can be used. This check does not import torchao."""
    if importlib.util.find_spec("torchao") is None:
        return f"torchao is not installed; {_INSTALL}"
    try:
        text = version("torchao")
    except PackageNotFoundError:
        return f"there is a module torchao that is not an installed package; {_INSTALL}"
    found = tuple(int(number) for number in re.findall(r"\d+", text)[:2])
    if found < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return f"torchao {text} is older than {oldest}, the first version with all needed fusions; {_INSTALL} --upgrade"
    return None


def unfit() -> str | None:
    """Why the processor of this machine cannot run integer products and what to do, or None if it can."""
    if not has_kernels():
        return (
            f"this build of torch has no oneDNN quantized linear; install a CPU build for x86, or {_ELSE} gives details"
        )
    if not sums_exactly():
        return (
            "this processor has no VNNI instructions, or ONEDNN_MAX_CPU_ISA forbids them, and without them the fused "
            f"products saturate; {_ELSE} is exact without them"
        )
    return None


@functools.cache
def without_floats(device: torch.device) -> str | None:
    """Why torch cannot multiply 8-bit floats on a device and what to do, or None if it can."""
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return "torch finds no NVIDIA GPU here; leave the model on the CPU"
        found = torch.cuda.get_device_capability(device)
        if torch.version.hip is None and found < _FLOATS:
            return (
                f"{torch.cuda.get_device_name(device)} has compute capability {found[0]}.{found[1]}, and products of "
                f"8-bit floats need {_FLOATS[0]}.{_FLOATS[1]}; use a precision such as w8a8, or {_FAKE}"
            )
        return None
    ones = torch.ones((16, 16)).to(torch.float8_e4m3fn)
    each = torch.ones((16, 1))
    try:
        sums = functional.scaled_mm(ones, ones.t(), each, _BY_ROW, each.t(), _BY_ROW, output_dtype=torch.float32)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return f"this build of torch does not multiply 8-bit floats on CPUs ({str(error).splitlines()[0]}); {_FAKE}"
    return None if bool((sums == 16.0).all()) else f"products of 8-bit floats of this build of torch are wrong; {_FAKE}"


@functools.cache
def register_fusions() -> None:
    """Register torchao's fusions with inductor. Without them the graphs run slowly (pytorch/ao issue 4823).

    Raises:
        BackendError: If torchao is missing or too old.
    """
    reason = missing()
    if reason is not None:
        raise BackendError(f"backend 'torchao': {reason}")
    # This import registers the fusions and the ops quantized_decomposed::*.
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer

    assert torch.ops.quantized_decomposed.quantize_per_tensor
    assert torchao
