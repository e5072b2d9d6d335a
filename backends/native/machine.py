"""Which instructions this machine has, and which kernels can therefore run."""

from __future__ import annotations

import functools

import torch

from fxquant.backends import onednn_products
from fxquant.backends.native.compiled.build import BuildError, load


@functools.cache
def missing_kernels() -> str | None:
    """Why the compiled kernels cannot run here; None if they can. Compiles them if the processor can run them."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return "this processor has no AVX-512 instructions, or ATEN_CPU_CAPABILITY forbids them"
    if not torch.cpu._is_vnni_supported() or (onednn_products.has_kernels() and not onednn_products.sums_exactly()):
        return "this processor has no VNNI instructions, or ONEDNN_MAX_CPU_ISA forbids them"
    try:
        load()
    except BuildError as error:
        return str(error)
    return None


def has_tiles() -> bool:
    """Whether this processor multiplies matrices of integers in tiles (AMX), which oneDNN uses."""
    return torch.cpu._is_amx_tile_supported()


def has_bf16_products() -> bool:
    """Whether this processor multiplies bfloat16."""
    return torch.cpu._is_avx512_bf16_supported()
