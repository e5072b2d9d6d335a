"""What calls the kernels that make codes of rows: checks arguments, allocates results, never waits for the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxquant.backends.native.gpu import machine
from fxquant.backends.native.gpu.arguments import FP8, check_floats, per_row, vectors
from fxquant.errors import BackendError

_MOST_CHANNELS = 65536
_BLOCK = 1024


@dataclass(frozen=True)
class Norm:
    """A norm of rows and what follows it: ``norm(x) * weight + bias``, times ``factor + plus``, plus ``shift``.

    Attributes:
        centered: Whether it is the layer norm, else that of the root mean square.
        eps: Of the norm.
        weight: `[channels]`.
        bias: `[channels]`.
        factor: `[channels]`, or one a sample.
        plus: What is added to it.
        shift: As the factor.
    """

    centered: bool
    eps: float
    weight: Tensor | None
    bias: Tensor | None
    factor: Tensor | None
    plus: float
    shift: Tensor | None


def norm_quantize(x: Tensor, *arguments: Any) -> Tensor:
    """The op ``triton_norm_quantize``: codes of float `x` `[..., channels]` behind a norm.

    Args:
        x: float32, bfloat16 or float16.
        arguments: Those of :class:`Norm`, then scale and zero point, the highest code, and the dtype of the codes.
    """
    *norm, scale, zero_point, qmax, dtype = arguments
    return _rows("triton_norm_quantize", x, Norm(*norm), (scale, zero_point), qmax, dtype, with_sums=False)[0]


def norm_quantize_sums(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The op ``triton_norm_quantize_sums``: the same, and the sums of the codes, int32 `[..., 1]`."""
    *norm, scale, zero_point, qmax, dtype = arguments
    codes, *_, sums = _rows("triton_norm_quantize_sums", x, Norm(*norm), (scale, zero_point), qmax, dtype)
    return codes, sums


def norm_quantize_tokens(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op ``triton_norm_quantize_tokens``: the same on grids that rows find, as :func:`quantize_tokens`."""
    *norm, qmax, dtype = arguments
    return _rows("triton_norm_quantize_tokens", x, Norm(*norm), None, qmax, dtype)


def quantize_tokens(x: Tensor, qmax: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op ``triton_quantize_tokens``: codes on a grid for each row, which covers its values.

    Returns:
        Codes of `dtype` `[..., channels]`; and `[..., 1]` scales in float32, zero points in uint8, those of the
        reference, bit for bit, and sums of the codes in int32.
    """
    return _rows("triton_quantize_tokens", x, None, None, qmax, dtype)


def quantize_sums(x: Tensor, scale: Tensor, zero_point: Tensor, qmax: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The op ``triton_quantize_sums``: :func:`quantize`, and the sums of the codes, int32 `[..., 1]`."""
    codes, *_, sums = _rows("triton_quantize_sums", x, None, (scale, zero_point), qmax, dtype)
    return codes, sums


def _rows(
    op: str,
    x: Tensor,
    norm: Norm | None,
    grid: tuple[Tensor, Tensor] | None,
    qmax: int,
    dtype: torch.dtype,
    with_sums: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes of rows, their scales and zero points, and sums, which are empty where they are not wanted.

    Args:
        op: Named in errors.
        x: Float `[..., channels]`.
        norm: Before the quantization.
        grid: Scale and zero point; None for those of each row's range.
        qmax: The highest code.
        dtype: Of the codes.
        with_sums: Whether there are sums.

    Raises:
        BackendError: For arguments that do not fit.
    """
    parts = (None,) * 4 if norm is None else (norm.weight, norm.bias, norm.factor, norm.shift)
    machine.check_tensors(op, x, *parts, *(grid or ()))
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
            num_warps=max(1, min(16, block // 512)),
        )
    return out, scale, zero_point, sums


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmax: int, dtype: torch.dtype) -> Tensor:
    """The op ``triton_quantize``: codes of `dtype` of float `x`, on the grid of the reference, bit for bit.

    Raises:
        BackendError: For arguments that do not fit.
    """
    machine.check_tensors("triton_quantize", x, scale, zero_point)
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
            f"the weight and bias of a norm are one vector of {channels} channels each, not {tuple(values.shape)}"
        )
    return values.contiguous()
