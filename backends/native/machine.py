"""Which instructions this machine has, and which kernels can therefore run."""

from __future__ import annotations

import enum
import functools

import torch

from fxquant.backends import onednn_products
from fxquant.backends.native.compiled.build import BuildError, load


class Instructions(enum.Enum):
    """What the compiled kernels are made of, and the compiler's flags for it."""

    VNNI = "AVX-512 VNNI", "vnni", ("-march=native",)
    AVX2 = "AVX2", "avx2", ("-mavx2", "-mfma", "-mf16c", "-mtune=native")

    def __init__(self, title: str, short: str, flags: tuple[str, ...]) -> None:
        self.title = title
        self.short = short
        self.flags = flags


def instructions() -> Instructions | None:
    """The best instructions that the processor has and that no environment variable forbids; None without AVX2.

    ``ATEN_CPU_CAPABILITY`` limits torch, and so do these kernels; ``ONEDNN_MAX_CPU_ISA`` may forbid VNNI alone.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    allowed = not onednn_products.has_kernels() or onednn_products.sums_exactly()
    if capability.startswith("AVX512") and torch.cpu._is_vnni_supported() and allowed:
        return Instructions.VNNI
    return Instructions.AVX2 if capability.startswith("AVX") and torch.cpu._is_avx2_supported() else None


@functools.cache
def missing_kernels() -> str | None:
    """Why the compiled kernels cannot run here; None if they can. Compiles them if the processor can run them."""
    found = instructions()
    if found is None:
        return "this processor has no AVX2 instructions, or ATEN_CPU_CAPABILITY forbids them"
    try:
        load(found.flags)
    except BuildError as error:
        return str(error)
    return None


def has_tiles() -> bool:
    """Whether this processor multiplies matrices of integers in tiles (AMX), which oneDNN uses."""
    return torch.cpu._is_amx_tile_supported()


def has_bf16_products() -> bool:
    """Whether the compiled kernels multiply bfloat16."""
    return torch.cpu._is_avx512_bf16_supported() and instructions() is Instructions.VNNI
