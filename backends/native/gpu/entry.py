"""What calls the kernels: checks arguments, allocates results, and never waits for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxquant.backends.native.gpu import machine
from fxquant.backends.native.gpu.configs import Config, choose
from fxquant.backends.native.gpu.weights import half_of, held_width
from fxquant.backends.native.library import FLOATS
from fxquant.errors import BackendError

FP8 = torch.float8_e4m3fn
CODES = (torch.int8, FP8)
"""Dtypes of activations that the product's kernel multiplies."""

_MOST_CHANNELS = 65536
_BLOCK = 1024


def linear(
    xq: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor,
    w_sums: Tensor,
    bias: Tensor | None,
    bits: int,
    out_features: int,
    activation: str,
    gate: Tensor | None,
    residual: Tensor | None,
    out_scale: Tensor | None,
    out_zero_point: Tensor | None,
    qmax: int,
    out_dtype: torch.dtype,
    group_size: int,
    w_offset: Tensor | None,
    x_sums: Tensor | None,
    config: Config | None = None,
) -> Tensor:
    """The op ``triton_linear``.

    Args:
        xq: int8 or float8_e4m3fn `[..., in]`.
        x_scale: float32, one for all, one a sample or one a row.
        x_zero_point: The same in uint8 or int32, of codes from 0.
        weight: As :mod:`fxquant.backends.native.gpu.weights` holds it.
        w_scale: float32 `[out, groups]`.
        w_zero_point: uint8 `[out, groups]`.
        w_sums: Sums of the held weight, `[out]`.
        bias: `[out]` or one a sample.
        bits: Bits of the weight.
        out_features: Output channels.
        activation: ``none``, ``silu`` or ``gelu_tanh``.
        gate: `[out]` or one a sample.
        residual: Of the shape of the result.
        out_scale: Of the grid of codes to return.
        out_zero_point: Of the same.
        qmax: The highest of those codes.
        out_dtype: Of the result where it is not codes.
        group_size: Input channels a group, 0 for one group.
        w_offset: Zero points that the held weight lacks, int32 `[out]`; None if it lacks none.
        x_sums: Sums of the rows of `xq`, int32, where there is such an offset.
        config: How to cut the product; that of the table by default.

    Raises:
        BackendError: For arguments that do not fit.
    """
    machine.check_tensors("triton_linear", xq, x_scale, x_zero_point, weight, w_scale, w_zero_point, w_sums, bias, gate,
                  residual, out_scale, out_zero_point, w_offset, x_sums)  # fmt: skip
    from fxquant.backends.native.gpu.kernels.linear import linear_kernel

    codes = xq.contiguous()
    inner = codes.shape[-1]
    rows = codes.numel() // inner if inner else 0
    halves = weight.dtype == torch.uint8
    _check_linear(xq, weight, out_features, group_size, halves, activation)
    dtype = out_dtype if out_scale is None else xq.dtype
    out = codes.new_empty((*codes.shape[:-1], out_features), dtype=dtype)
    if (w_offset is None) != (x_sums is None):
        raise BackendError("a weight with zero points of its own takes both w_offset and x_sums")
    if residual is not None and residual.shape != out.shape:
        raise BackendError(
            f"the residual {tuple(residual.shape)} is not of the shape of the result, {tuple(out.shape)}"
        )
    if not out.numel():
        return out
    if config is None:
        config = _config(codes, rows, out_features, inner, group_size, halves)
    x_scale, x_scale_rows = _per_row(x_scale, xq, rows, "scale of the codes")
    x_zero_point, x_zero_point_rows = _per_row(x_zero_point, xq, rows, "zero point of the codes")
    bias, bias_rows, bias_stride = _vectors(bias, xq, rows, out_features, "bias")
    gate, gate_rows, gate_stride = _vectors(gate, xq, rows, out_features, "gate")
    out_scale, out_scale_rows = _per_row(out_scale, xq, rows, "scale of the result")
    out_zero_point, out_zero_point_rows = _per_row(out_zero_point, xq, rows, "zero point of the result")
    tiles = -(-rows // config.block_m) * -(-out_features // config.block_n)
    half = half_of(group_size) if halves else 0
    with torch.cuda.device_of(codes):
        linear_kernel[(tiles,)](
            codes,
            weight,
            out,
            x_scale,
            x_zero_point,
            w_scale,
            w_zero_point,
            w_sums,
            w_offset,
            x_sums,
            bias,
            gate,
            None if residual is None else residual.contiguous(),
            out_scale,
            out_zero_point,
            rows,
            out_features,
            inner,
            x_scale_rows,
            x_zero_point_rows,
            bias_rows,
            bias_stride,
            gate_rows,
            gate_stride,
            out_scale_rows,
            out_zero_point_rows,
            qmax,
            ACTIVATION=activation,
            HALF=half,
            GROUP=group_size,
            FP8=xq.dtype == FP8,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=step_of(config, group_size),
            SUPER_M=config.super_m,
            WARPS=config.warps,
            num_warps=config.warps,
            num_stages=config.stages,
        )
    return out


def norm_quantize(
    x: Tensor,
    centered: bool,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    factor: Tensor | None,
    plus: float,
    shift: Tensor | None,
    out_scale: Tensor,
    out_zero_point: Tensor,
    qmax: int,
    dtype: torch.dtype,
) -> Tensor:
    """The op ``triton_norm_quantize``: codes of `dtype` of float `x` `[..., channels]`.

    Raises:
        BackendError: For arguments that do not fit.
    """
    machine.check_tensors("triton_norm_quantize", x, weight, bias, factor, shift, out_scale, out_zero_point)
    from fxquant.backends.native.gpu.kernels.rows import norm_quantize_kernel

    _check_floats("triton_norm_quantize", x)
    channels = x.shape[-1]
    if not 0 < channels <= _MOST_CHANNELS:
        raise BackendError(f"triton_norm_quantize reads rows of 1 to {_MOST_CHANNELS} channels, not {channels}")
    x = x.contiguous()
    out = x.new_empty(x.shape, dtype=dtype)
    rows = x.numel() // channels
    if not rows:
        return out
    whole = [_vectors(value, x, rows, channels, name) for value, name in ((weight, "weight"), (bias, "bias"))]
    if any(value is not None and shared != rows for value, shared, _ in whole):
        raise BackendError("the weight and bias of a norm are one vector each, not one a sample")
    factor, factor_rows, factor_stride = _vectors(factor, x, rows, channels, "factor")
    shift, shift_rows, shift_stride = _vectors(shift, x, rows, channels, "shift")
    scale, scale_rows = _per_row(out_scale, x, rows, "scale of the result")
    zero_point, zero_point_rows = _per_row(out_zero_point, x, rows, "zero point of the result")
    block = 1 << (channels - 1).bit_length()
    with torch.cuda.device_of(x):
        norm_quantize_kernel[(rows,)](
            x,
            out,
            whole[0][0],
            whole[1][0],
            factor,
            shift,
            scale,
            zero_point,
            channels,
            factor_rows,
            factor_stride,
            shift_rows,
            shift_stride,
            scale_rows,
            zero_point_rows,
            qmax,
            eps,
            plus,
            CENTERED=centered,
            FP8=dtype == FP8,
            BLOCK=block,
            num_warps=max(1, min(16, block // 512)),
        )
    return out


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmax: int, dtype: torch.dtype) -> Tensor:
    """The op ``triton_quantize``: codes of `dtype` of float `x`, on the grid of the reference, bit for bit.

    Raises:
        BackendError: For arguments that do not fit.
    """
    machine.check_tensors("triton_quantize", x, scale, zero_point)
    from fxquant.backends.native.gpu.kernels.rows import quantize_kernel

    _check_floats("triton_quantize", x)
    x = x.contiguous()
    out = x.new_empty(x.shape, dtype=dtype)
    if not x.numel():
        return out
    columns = x.shape[-1] if x.dim() else 1
    rows = x.numel() // columns
    scale, scale_rows = _per_row(scale, x, rows, "scale")
    zero_point, zero_point_rows = _per_row(zero_point, x, rows, "zero point")
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


def step_of(config: Config, group_size: int) -> int:
    """Input channels a step of the product: no step reaches over the end of a group."""
    step = config.block_k
    while group_size and group_size % step:
        step //= 2
    return step


def _config(codes: Tensor, rows: int, out: int, inner: int, group_size: int, halves: bool) -> Config:
    kind = "int4" if halves else "fp8" if codes.dtype == FP8 else "int8"
    kind += f"-g{group_size}" if group_size else ""
    return choose(kind, rows, out, inner, machine.name(codes.device))


def _check_floats(op: str, x: Tensor) -> None:
    if x.dtype not in FLOATS:
        raise BackendError(f"{op} reads float32, bfloat16 and float16, not {x.dtype}")


def _check_linear(xq: Tensor, weight: Tensor, out: int, group_size: int, halves: bool, activation: str) -> None:
    if xq.dtype not in CODES or (weight.dtype != xq.dtype and not (halves and xq.dtype == torch.int8)):
        raise BackendError(f"triton_linear multiplies no {xq.dtype} codes by a weight held as {weight.dtype}")
    shape = (out, held_width(xq.shape[-1], halves, group_size))
    if tuple(weight.shape) != shape or not weight.is_contiguous():
        raise BackendError(
            f"a weight of {out} outputs and {xq.shape[-1]} inputs is held as contiguous {shape}, not {weight.stride()} "
            f"{tuple(weight.shape)}"
        )
    if activation not in ("none", "silu", "gelu_tanh"):
        raise BackendError(f"activation={activation!r}: there are none, silu and gelu_tanh")


def _per_row(values: Any, x: Tensor, rows: int, what: str) -> tuple[Any, int]:
    """Entries of a grid in a row, and how many rows of `x` share one."""
    if values is None:
        return None, 1
    count = values.numel()
    if count == 1:
        return values, rows
    leading = tuple(values.shape[:-1])
    # One a sample, or one a row: the axes that have entries come first.
    each_sample = leading[:1] == (count,) == tuple(x.shape[:1]) and values.dim() <= x.dim()
    known = leading == tuple(x.shape[:-1]) or each_sample
    if values.shape[-1] != 1 or not known:
        raise BackendError(f"the {what} {tuple(values.shape)} does not fit rows of {tuple(x.shape)}")
    return values.contiguous(), rows // count


def _vectors(values: Any, x: Tensor, rows: int, channels: int, what: str) -> tuple[Any, int, int]:
    """Vectors of the channels, how many rows of `x` share one, and how far they are apart in memory."""
    if values is None:
        return None, 1, 0
    count = values.numel() // channels if channels else 0
    alone = count == values.shape[0] == x.shape[0] and 1 < values.dim() <= x.dim()
    if values.shape[-1] != channels or not (count == 1 or alone):
        raise BackendError(
            f"the {what} {tuple(values.shape)} is no vector of {channels} channels, one for all or one a sample"
        )
    flat = values.reshape(count, channels)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    return flat, rows // count, flat.stride(0)
