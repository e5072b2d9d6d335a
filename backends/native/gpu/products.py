"""What calls the product's kernel: checks arguments, allocates the result, and never waits for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxquant.backends.native.gpu import machine
from fxquant.backends.native.gpu.arguments import CODES, FP8, per_row, vectors
from fxquant.backends.native.gpu.configs import Config, choose, step_of
from fxquant.backends.native.gpu.weights import half_of, held_width
from fxquant.errors import BackendError


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
    out_sums: Tensor | None = None,
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
        out_sums: The sums of the rows of the codes to return are added to it, int32, one a row.

    Raises:
        BackendError: For arguments that do not fit.
    """
    machine.check_tensors("triton_linear", xq, x_scale, x_zero_point, weight, w_scale, w_zero_point, w_sums, bias, gate,
                  residual, out_scale, out_zero_point, w_offset, x_sums)  # fmt: skip
    from fxquant.backends.native.gpu.kernels.linear import linear_kernel

    codes = xq.contiguous()
    inner = codes.shape[-1]
    halves = weight.dtype == torch.uint8
    _check_linear(xq, weight, out_features, group_size, halves, activation)
    rows = codes.numel() // inner
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
    x_scale, x_scale_rows = per_row(x_scale, xq, rows, "scale of the codes")
    x_zero_point, x_zero_point_rows = per_row(x_zero_point, xq, rows, "zero point of the codes")
    bias, bias_rows, bias_stride = vectors(bias, xq, rows, out_features, "bias")
    gate, gate_rows, gate_stride = vectors(gate, xq, rows, out_features, "gate")
    out_scale, out_scale_rows = per_row(out_scale, xq, rows, "scale of the result")
    out_zero_point, out_zero_point_rows = per_row(out_zero_point, xq, rows, "zero point of the result")
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
            out_sums,
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


def linear_sums(xq: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The op ``triton_linear_sums``: int8 codes as :func:`linear` returns them, and their sums, int32 `[..., 1]`."""
    sums = xq.new_zeros((*xq.shape[:-1], 1), dtype=torch.int32)
    everything: tuple[Any, ...] = (xq, *arguments, None, sums)
    return linear(*everything), sums


def _config(codes: Tensor, rows: int, out: int, inner: int, group_size: int, halves: bool) -> Config:
    kind = "int4" if halves else "fp8" if codes.dtype == FP8 else "int8"
    kind += f"-g{group_size}" if group_size else ""
    return choose(kind, rows, out, inner, machine.name(codes.device))


def _check_linear(xq: Tensor, weight: Tensor, out: int, group_size: int, halves: bool, activation: str) -> None:
    if xq.dtype not in CODES or (weight.dtype != xq.dtype and not (halves and xq.dtype == torch.int8)):
        raise BackendError(f"triton_linear multiplies no {xq.dtype} codes by a weight held as {weight.dtype}")
    shape = (out, held_width(xq.shape[-1], halves, group_size))
    if tuple(weight.shape) != shape or not weight.is_contiguous() or not xq.shape[-1]:
        raise BackendError(
            f"a weight of {out} outputs and {xq.shape[-1]} inputs is held as contiguous {shape}, not {weight.stride()} "
            f"{tuple(weight.shape)}"
        )
    if activation not in ("none", "silu", "gelu_tanh"):
        raise BackendError(f"activation={activation!r}: there are none, silu and gelu_tanh")
