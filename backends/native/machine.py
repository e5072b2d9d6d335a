"""Which instructions this machine has, and which kernels can therefore run."""

from __future__ import annotations

import functools

import torch

from fxquant.backends.native.compiled.build import BuildError, load


def has_kernels() -> bool:
    """Whether this build of torch has oneDNN's quantized linear."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise")


@functools.cache
def sums_exactly() -> bool:
    """Whether products of uint8 and int8 are summed without saturation.

    Without VNNI instructions oneDNN adds pairs of products in 16 bits, which saturate: 2 * 255 * 127 does not fit. No
    flag of torch tells which kernel oneDNN takes, as ``ONEDNN_MAX_CPU_ISA`` may forbid instructions of the processor.
    """
    codes = torch.full((4, 64), 255, dtype=torch.uint8)
    weight = torch.ops.onednn.qlinear_prepack(torch.full((32, 64), 127, dtype=torch.int8), None)
    offsets = torch.zeros(32, dtype=torch.int64)
    product = torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, 0, weight, torch.ones(32, dtype=torch.float32), offsets, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return bool((product == 64 * 255 * 127).all())


@functools.cache
def missing_kernels() -> str | None:
    """Why the compiled kernels cannot run here; None if they can. Compiles them if the processor can run them."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return "this processor has no AVX-512 instructions, or ATEN_CPU_CAPABILITY forbids them"
    if not torch.cpu._is_vnni_supported() or (has_kernels() and not sums_exactly()):
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
