"""What the quantized products of oneDNN can do on this machine; several backends use them."""

from __future__ import annotations

import functools

import torch


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
