"""Requirements on torchao and on this machine. torchao is optional: this module imports it on first use."""

from __future__ import annotations

import functools
import importlib.util
import re
from importlib.metadata import PackageNotFoundError, version

import torch

from fxquant.backends.onednn_products import has_kernels, sums_exactly
from fxquant.errors import BackendError

OLDEST = (0, 18)
"""The first version of torchao with all fusions that lowered graphs rely on."""

_INSTALL = "pip install 'fxquant[torchao]'"
_ELSE = "use backend 'native', which"


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
