"""Calls the kernels that make codes of rows: checks arguments, allocates results, never waits for the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxquant.backends.native.gpu import machine, rotations
from fxquant.backends.native.gpu.arguments import FP8, check_floats, check_zero_point, per_row, vectors
from fxquant.errors import BackendError

_MOST_CHANNELS = 65536
_BLOCK = 1024


@dataclass(frozen=True)
class Norm:
    """A norm of rows and its modulation: ``norm(x) * weight + bias``, times ``factor + plus``, plus ``shift``.

    Attributes:
        centered: True for the layer norm, False for the RMS norm.
        eps: Epsilon of the norm.
        weight: `[channels]`.
        bias: `[channels]`.
        factor: `[channels]`, or one per sample.
        plus: Added to the factor.
        shift: `[channels]`, or one per sample.
    """

    centered: bool
    eps: float
    weight: Tensor | None
    bias: Tensor | None
    factor: Tensor | None
    plus: float
    shift: Tensor | None


@dataclass(frozen=True)
class Turn:
    """A rotation of channels by Hadamard matrices, after the norm.

    Attributes:
        signs: int8 `[channels]` of 1 and -1; None for no rotation.
        block: Channels per Hadamard matrix.
    """

    signs: Tensor | None = None
    block: int = 1


def norm_quantize(x: Tensor, *arguments: Any) -> Tensor:
    """The op ``triton_norm_quantize``: codes of float `x` `[..., channels]` after a norm.

    Args:
        x: float32, bfloat16 or float16.
        arguments: Those of :class:`Norm`, then the scale, the zero point, the highest code and the dtype of codes;
            then those of :class:`Turn`, which may be left out.
    """
    scale, zero_point, qmax, dtype, *turn = arguments[7:]
    grid, norm = (scale, zero_point), Norm(*arguments[:7])
    return _rows("triton_norm_quantize", x, norm, grid, qmax, dtype, Turn(*turn), with_sums=False)[0]


def norm_quantize_sums(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The op ``triton_norm_quantize_sums``: :func:`norm_quantize`, and the sums of the codes, int32 `[..., 1]`."""
    scale, zero_point, qmax, dtype, *turn = arguments[7:]
    grid, norm = (scale, zero_point), Norm(*arguments[:7])
    codes, *_, sums = _rows("triton_norm_quantize_sums", x, norm, grid, qmax, dtype, Turn(*turn))
    return codes, sums


def norm_quantize_tokens(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op ``triton_norm_quantize_tokens``: :func:`quantize_tokens` after a norm."""
    qmax, dtype, *turn = arguments[7:]
    return _rows("triton_norm_quantize_tokens", x, Norm(*arguments[:7]), None, qmax, dtype, Turn(*turn))


def quantize_tokens(
    x: Tensor, qmax: int, dtype: torch.dtype, signs: Tensor | None = None, block: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op ``triton_quantize_tokens``: codes on one grid per row, which covers the values of the row.

    With signs the channels are rotated before; the grid covers the rotated values.

    Returns:
        Codes of `dtype`, `[..., channels]`. Scales in float32 and zero points in uint8, `[..., 1]`, which match the
        reference bit for bit. Sums of the codes in int32, `[..., 1]`.
    """
    return _rows("triton_quantize_tokens", x, None, None, qmax, dtype, Turn(signs, block))


def quantize_sums(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmax: int,
    dtype: torch.dtype,
    signs: Tensor | None = None,
    block: int = 1,
) -> tuple[Tensor, Tensor]:
    """The op ``triton_quantize_sums``: :func:`quantize`, and the sums of the codes, int32 `[..., 1]`."""
    turn = Turn(signs, block)
    codes, *_, sums = _rows("triton_quantize_sums", x, None, (scale, zero_point), qmax, dtype, turn)
    return codes, sums


def _rows(
    op: str,
    x: Tensor,
    norm: Norm | None,
    grid: tuple[Tensor, Tensor | None] | None,
    qmax: int,
    dtype: torch.dtype,
    turn: Turn,
    with_sums: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes of rows, their scales and zero points, and their sums, which are empty without `with_sums`.

    Args:
        op: The op that errors name.
        x: Float `[..., channels]`.
        norm: Applied before the quantization; None for no norm.
        grid: Scale and zero point; None to compute them from each row's range.
        qmax: The highest code.
        dtype: Dtype of the codes.
        turn: Applied after the norm.
        with_sums: Whether to compute the sums.

    Raises:
        BackendError: If arguments do not fit.
    """
    parts = (None,) * 4 if norm is None else (norm.weight, norm.bias, norm.factor, norm.shift)
    machine.check_tensors(op, x, *parts, *(grid or ()), turn.signs)
    if turn.signs is not None:
        rotations.check(op, x, turn.signs, turn.block)
    if grid is not None:
        check_zero_point(op, dtype, grid[1])
    from fxquant.backends.native.gpu.kernels.rows import quantize_rows_kernel

    check_floats(op, x)
    channels = x.shape[-1] if x.dim() else 0
    if not 0 < channels <= _MOST_CHANNELS:
        raise BackendError(f"{op} reads rows of 1 to {_MOST_CHANNELS} channels, not {channels}")
    x = x.contiguous()
    rows = x.numel() // channels
    out, each = x.new_empty(x.shape, dtype=dtype), (*x.shape[:-1], 1)
    sums = x.new_empty(each if with_sums else 0, dtype=torch.int32)
    scale_rows, zero_point_rows = 1, 1
    if grid is None or not rows:
        scale, zero_point = x.new_empty(each, dtype=torch.float32), x.new_empty(each, dtype=torch.uint8)
    else:
        scale, scale_rows = per_row(grid[0], x, rows, "scale of the result")
        zero_point, zero_point_rows = per_row(grid[1], x, rows, "zero point of the result")
    if not rows:
        return out, scale, zero_point, sums
    weight, bias = (_whole_vector(part, channels) for part in parts[:2])
    factor, factor_rows, factor_stride = vectors(parts[2], x, rows, channels, "factor")
    shift, shift_rows, shift_stride = vectors(parts[3], x, rows, channels, "shift")
    block = 1 << (channels - 1).bit_length()
    with torch.cuda.device_of(x):
        quantize_rows_kernel[(rows,)](
            x,
            out,
            weight,
            bias,
            factor,
            shift,
            scale,
            zero_point,
            sums if with_sums else None,
            None if turn.signs is None else turn.signs.contiguous(),
            channels,
            factor_rows,
            factor_stride,
            shift_rows,
            shift_stride,
            scale_rows,
            zero_point_rows,
            qmax,
            0.0 if norm is None else norm.eps,
            0.0 if norm is None else norm.plus,
            NORM="none" if norm is None else "layer" if norm.centered else "rms",
            TOKENS=grid is None,
            FP8=dtype == FP8,
            BLOCK=block,
            FACTOR=turn.block**-0.5,
            STEPS=turn.block.bit_length() - 1,
            num_warps=max(1, min(16, block // 512)),
        )
    return out, scale, zero_point, sums


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmax: int,
    dtype: torch.dtype,
    signs: Tensor | None = None,
    block: int = 1,
) -> Tensor:
    """The op ``triton_quantize``: quantize float `x` to codes of `dtype`, on the grid of the reference, bit for bit.

    8-bit floats have no zero point, and `qmax` means nothing for them. With signs the channels are rotated before.

    Raises:
        BackendError: If arguments do not fit.
    """
    if signs is not None:
        return rotations.hadamard_quantize(x, signs, block, scale, zero_point, qmax, dtype)
    machine.check_tensors("triton_quantize", x, scale, zero_point)
    check_zero_point("triton_quantize", dtype, zero_point)
    from fxquant.backends.native.gpu.kernels.rows import quantize_kernel

    check_floats("triton_quantize", x)
    x = x.contiguous()
    out = x.new_empty(x.shape, dtype=dtype)
    if not x.numel():
        return out
    columns = x.shape[-1] if x.dim() else 1
    rows = x.numel() // columns
    scale, scale_rows = per_row(scale, x, rows, "scale")
    zero_point, zero_point_rows = per_row(zero_point, x, rows, "zero point")
    block_n = min(_BLOCK, 1 << (columns - 1).bit_length())
    block_m = min(_BLOCK // block_n, 1 << (rows - 1).bit_length())
    with torch.cuda.device_of(x):
        quantize_kernel[(-(-rows // block_m), -(-columns // block_n))](
            x,
            out,
            scale,
            zero_point,
            rows,
            columns,
            scale_rows,
            zero_point_rows,
            qmax,
            FP8=dtype == FP8,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
        )
    return out


def row_sums(xq: Tensor) -> Tensor:
    """The op ``triton_row_sums``: sums of int8 codes `[..., in]`, int32 `[..., 1]`."""
    machine.check_tensors("triton_row_sums", xq)
    from fxquant.backends.native.gpu.kernels.rows import row_sums_kernel

    xq = xq.contiguous()
    out = xq.new_empty((*xq.shape[:-1], 1), dtype=torch.int32)
    if out.numel():
        block = min(2048, 1 << (xq.shape[-1] - 1).bit_length())
        with torch.cuda.device_of(xq):
            row_sums_kernel[(out.numel(),)](xq, out, xq.shape[-1], BLOCK=block)
    return out


def _whole_vector(values: Tensor | None, channels: int) -> Tensor | None:
    if values is None:
        return None
    if values.numel() != channels or values.shape[-1] != channels:
        raise BackendError(
            f"the weight and bias of a norm must each be a vector of {channels} channels, not {tuple(values.shape)}"
        )
    return values.contiguous()
