"""Calls the matrix-product kernel: checks arguments, allocates the result, and never waits for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxquant.backends.native.gpu import machine
from fxquant.backends.native.gpu.arguments import CODES, FP8, check_zero_point, per_row, vectors
from fxquant.backends.native.gpu.configs import Config, choose, step_of
from fxquant.backends.native.gpu.weights import half_of, held_width
from fxquant.backends.native.library import FLOATS
from fxquant.errors import BackendError

MOST_RANK = 128
"""The highest rank of a branch that the kernel adds."""

_LEAST_RANK = 16  # Tensor cores multiply at least so many.


def linear(
    xq: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    weight: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor | None,
    w_sums: Tensor | None,
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
    inner: Tensor | None = None,
    up: Tensor | None = None,
    *,
    config: Config | None = None,
    out_sums: Tensor | None = None,
) -> Tensor:
    """The op ``triton_linear``.

    Args:
        xq: int8 or float8_e4m3fn `[..., in]`.
        x_scale: float32, one for all, one per sample or one per row.
        x_zero_point: The same in uint8 or int32, for codes that start at 0; None for 8-bit floats.
        weight: In the layout of :mod:`fxquant.backends.native.gpu.weights`.
        w_scale: float32 `[out, groups]`.
        w_zero_point: uint8 `[out, groups]`; None for 8-bit floats.
        w_sums: Row sums of the stored weight, `[out]`; None for 8-bit floats.
        bias: `[out]`, or one per sample.
        bits: Bits of the weight.
        out_features: Output channels.
        activation: ``none``, ``silu`` or ``gelu_tanh``.
        gate: `[out]`, or one per sample.
        residual: Has the shape of the result.
        out_scale: Scale of the codes to return; None to return values.
        out_zero_point: Zero point of the codes to return.
        qmax: The highest code to return.
        out_dtype: Dtype of the result if it is values.
        group_size: Input channels per group, 0 for one group.
        w_offset: Zero points not yet subtracted from the stored weight, int32 `[out]`; None if they all are.
        x_sums: Sums of the rows of `xq`, int32; required with `w_offset`.
        inner: Inner values of a branch of low rank, `[..., rank]`, float32, bfloat16 or float16: `inner up^T` is added
            before the bias.
        up: `[out, rank]` of the dtype of `inner`.
        config: The tiling of the product; by default :func:`fxquant.backends.native.gpu.configs.choose` chooses it.
        out_sums: The sums of the rows of the returned codes are added to this tensor, int32, one entry per row.

    Raises:
        BackendError: If arguments do not fit.
    """
    machine.check_tensors("triton_linear", xq, x_scale, x_zero_point, weight, w_scale, w_zero_point, w_sums, bias, gate,
                  residual, out_scale, out_zero_point, w_offset, x_sums, inner, up)  # fmt: skip
    from fxquant.backends.native.gpu.kernels.linear import linear_kernel

    codes = xq.contiguous()
    features = codes.shape[-1]
    halves = weight.dtype == torch.uint8
    _check_linear(xq, weight, out_features, group_size, halves, activation)
    for zero_point in (x_zero_point, w_zero_point, *(() if out_scale is None else (out_zero_point,))):
        check_zero_point("triton_linear", xq.dtype, zero_point)
    rank = check_branch(xq, inner, up, out_features)
    rows = codes.numel() // features
    dtype = out_dtype if out_scale is None else xq.dtype
    out = codes.new_empty((*codes.shape[:-1], out_features), dtype=dtype)
    if (w_offset is None) != (x_sums is None):
        raise BackendError("w_offset and x_sums must be given together, and only one of them is given")
    if residual is not None and residual.shape != out.shape:
        raise BackendError(
            f"the residual {tuple(residual.shape)} does not have the shape of the result, {tuple(out.shape)}"
        )
    if not out.numel():
        return out
    if config is None:
        config = _config(codes, rows, out_features, features, group_size, halves)
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
            None if inner is None else inner.contiguous(),
            None if up is None else up.contiguous(),
            out_scale,
            out_zero_point,
            out_sums,
            rows,
            out_features,
            features,
            x_scale_rows,
            x_zero_point_rows,
            bias_rows,
            bias_stride,
            gate_rows,
            gate_stride,
            out_scale_rows,
            out_zero_point_rows,
            qmax,
            rank,
            ACTIVATION=activation,
            HALF=half,
            GROUP=group_size,
            FP8=xq.dtype == FP8,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=step_of(config, group_size),
            SUPER_M=config.super_m,
            WARPS=config.warps,
            RANK=max(_LEAST_RANK, 1 << (rank - 1).bit_length()),
            num_warps=config.warps,
            num_stages=config.stages,
        )
    return out


def linear_sums(xq: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The op ``triton_linear_sums``: int8 codes as :func:`linear` returns them, and their sums, int32 `[..., 1]`."""
    sums = xq.new_zeros((*xq.shape[:-1], 1), dtype=torch.int32)
    return linear(xq, *arguments, out_sums=sums), sums


def check_branch(xq: Tensor, inner: Tensor | None, up: Tensor | None, out_features: int) -> int:
    """The rank of a branch, 1 if there is none.

    Raises:
        BackendError: If inner values and factor do not fit the codes and each other.
    """
    if inner is None and up is None:
        return 1
    if inner is None or up is None:
        raise BackendError("inner and up must be given together, and only one of them is given")
    rank = inner.shape[-1]
    fits = inner.shape[:-1] == xq.shape[:-1] and tuple(up.shape) == (out_features, rank) and 0 < rank <= MOST_RANK
    if not fits or inner.dtype != up.dtype or inner.dtype not in FLOATS:
        raise BackendError(
            f"a branch to {out_features} outputs beside codes {tuple(xq.shape)} needs inner values and a factor of one "
            f"float dtype and of rank 1 to {MOST_RANK}, not {tuple(inner.shape)} and {tuple(up.shape)} of "
            f"{inner.dtype} and {up.dtype}"
        )
    return rank


def _config(codes: Tensor, rows: int, out: int, inner: int, group_size: int, halves: bool) -> Config:
    kind = "int4" if halves else "fp8" if codes.dtype == FP8 else "int8"
    kind += f"-g{group_size}" if group_size else ""
    return choose(kind, rows, out, inner, machine.name(codes.device))


def _check_linear(xq: Tensor, weight: Tensor, out: int, group_size: int, halves: bool, activation: str) -> None:
    if xq.dtype not in CODES or (weight.dtype != xq.dtype and not (halves and xq.dtype == torch.int8)):
        raise BackendError(f"triton_linear cannot multiply {xq.dtype} codes by a weight stored as {weight.dtype}")
    shape = (out, held_width(xq.shape[-1], halves, group_size))
    if tuple(weight.shape) != shape or not weight.is_contiguous() or not xq.shape[-1]:
        raise BackendError(
            f"a weight of {out} outputs and {xq.shape[-1]} inputs must be contiguous {shape}, not strides "
            f"{weight.stride()} and shape {tuple(weight.shape)}"
        )
    if activation not in ("none", "silu", "gelu_tanh"):
        raise BackendError(f"activation={activation!r}: use 'none', 'silu' or 'gelu_tanh'")
