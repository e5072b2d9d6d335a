"""Rotations of channels: calls their kernel, and moves them into the kernels that make codes of the rotated values."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fxquant.backends.native import fusions
from fxquant.backends.native.gpu import machine
from fxquant.backends.native.gpu.arguments import FP8, check_floats, check_zero_point, per_row
from fxquant.backends.native.library import FLOATS
from fxquant.backends.native.tensors import by_sample, only_reader
from fxquant.errors import BackendError
from fxquant.ir.arguments import args
from fxquant.ir.rewriter import Rewriter

reference, native = torch.ops.fxquant, torch.ops.fxquant_native

MOST_CHANNELS = 16384
"""The most channels that one program transforms in its registers."""

_TILE = 1024


def lower(graph: fx.Graph, rewriter: Rewriter, kernels: fusions.Kernels) -> None:
    """Replace rotations by kernels, after all other ops were fused.

    Before::

        y = fxquant.hadamard(x, signs, block)
        codes = fxquant_native.triton_quantize(y, s, z, 255, int8)

    After::

        codes = fxquant_native.triton_quantize(x, s, z, 255, int8, signs, block)

    The kernel also computes a norm and a modulation before the rotation, and grids of tokens. A rotation that others
    read as well becomes ``fxquant_native.triton_hadamard``. Rotations of float64, and in blocks of more than
    :data:`MOST_CHANNELS` channels, stay as they are.
    """
    makers = (kernels.quantize, kernels.quantize_tokens, native.triton_quantize_blocks.default)
    for node in list(graph.nodes):
        if node.target is not reference.hadamard.default or node.meta["val"].dtype not in FLOATS:
            continue
        given = args(node).x, args(node).signs, args(node).block
        if given[2] > MOST_CHANNELS:
            continue
        codes = only_reader(node)
        if codes is None or codes.target not in makers:
            with rewriter.before(node):
                rewriter.replace(node, rewriter.call(native.triton_hadamard.default, given, [node], layer=True))
            continue
        with rewriter.before(codes):
            arguments = args(codes).replaced(x=given[0], signs=given[1], block=given[2])
            new = rewriter.call(codes.target, arguments, [node, codes], layer=True)
        rewriter.replace(codes, new)
        rewriter.erase(node)
        if new.target is kernels.quantize_tokens:
            fusions.fuse_norm(new, rewriter, kernels.norm_quantize_tokens)
        elif new.target is kernels.quantize and by_sample(args(new).node("scale")):
            fusions.fuse_norm(new, rewriter, kernels.norm_quantize)


def check(op: str, x: Tensor, signs: Tensor, block: int) -> None:
    """Refuse signs and blocks that do not fit values.

    Raises:
        BackendError: The message names `op`.
    """
    check_floats(op, x)
    channels = x.shape[-1] if x.dim() else 1
    if signs.dtype != torch.int8 or tuple(signs.shape) != (channels,):
        raise BackendError(f"{op}: signs are int8 [{channels}], one per channel, not {signs.dtype} {[*signs.shape]}")
    if block < 1 or block & (block - 1) or channels % block or block > MOST_CHANNELS:
        raise BackendError(
            f"{op}: blocks of {block} channels are not powers of two up to {MOST_CHANNELS} that divide {channels}"
        )


def hadamard(x: Tensor, signs: Tensor, block: int) -> Tensor:
    """The op ``triton_hadamard``: `(x * signs) H`, as ``fxquant::hadamard``, summed in float32.

    Args:
        x: float32, bfloat16 or float16 `[..., channels]`.
        signs: int8 `[channels]`, 1 or -1.
        block: Channels per Hadamard matrix.

    Raises:
        BackendError: If arguments do not fit.
    """
    machine.check_tensors("triton_hadamard", x, signs)
    return _run("triton_hadamard", x, signs, block, None, None, 0, x.dtype)


def hadamard_quantize(
    x: Tensor, signs: Tensor, block: int, scale: Tensor, zero_point: Tensor | None, qmax: int, dtype: torch.dtype
) -> Tensor:
    """The op ``triton_quantize`` with signs: codes of what :func:`hadamard` returns, bit for bit.

    Raises:
        BackendError: If arguments do not fit.
    """
    machine.check_tensors("triton_quantize", x, signs, scale, zero_point)
    check_zero_point("triton_quantize", dtype, zero_point)
    return _run("triton_quantize", x, signs, block, scale, zero_point, qmax, dtype)


def _run(
    op: str,
    x: Tensor,
    signs: Tensor,
    block: int,
    scale: Tensor | None,
    zero_point: Tensor | None,
    qmax: int,
    dtype: torch.dtype,
) -> Tensor:
    from fxquant.backends.native.gpu.kernels.hadamard import hadamard_kernel

    check(op, x, signs, block)
    x = x.contiguous()
    out = x.new_empty(x.shape, dtype=dtype)
    if not x.numel():
        return out
    channels = x.shape[-1]
    rows, blocks = x.numel() // channels, x.numel() // block
    scale, scale_rows = per_row(scale, x, rows, "scale")
    zero_point, zero_point_rows = per_row(zero_point, x, rows, "zero point")
    tile = min(max(1, _TILE // block), 1 << (blocks - 1).bit_length())
    with torch.cuda.device_of(x):
        hadamard_kernel[(-(-blocks // tile),)](
            x,
            signs.contiguous(),
            out,
            scale,
            zero_point,
            blocks,
            channels // block,
            scale_rows,
            zero_point_rows,
            qmax,
            FACTOR=block**-0.5,
            STEPS=block.bit_length() - 1,
            FP8=dtype == FP8,
            BLOCK=block,
            TILE=tile,
            num_warps=max(1, min(16, tile * block // 512)),
        )
    return out
