"""Operators of layers: dequantization of a packed weight, and integer products with it."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from fxquant.errors import ConfigurationError
from fxquant.ir.ops.definition import check_activation_grid, check_broadcast, define
from fxquant.numerics import grids, weights
from fxquant.numerics.packing import packed_size, unpack


def dequantize_weight(
    wq: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight `scale * (q - zero_point)`, `[out, in_features]` of `dtype`, from packed codes.

    `wq` is uint8 `[out, packed_size(in_features, bits)]`, `scale` and `zero_point` are `[out, groups]`; `group_size` is
    the number of input channels per group, 0 for one group per row. For a linear whose activations stay float.
    """
    _check_weight(wq, scale, zero_point, bits, group_size, in_features)
    return weights.dequantize_weight(wq, scale, zero_point, bits, group_size, in_features, dtype).contiguous()


def _fake_dequantize_weight(
    wq: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    _check_weight(wq, scale, zero_point, bits, group_size, in_features)
    return wq.new_empty((wq.shape[0], in_features), dtype=dtype)


def linear(
    xq: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    wq: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """An integer product, scaled to real numbers: `x_scale * w_scale * sum_k (xq_k - x_zp) (wq_k - w_zp) + bias`.

    `xq` holds integers `[..., in]`; the weight is as for :func:`dequantize_weight`. With groups, `w_scale` and
    `w_zero_point` belong to the group of k and move into the sum. `bias` broadcasts to the result: `[out]`, or
    `[batch, 1, out]` for one row per sample. The result is `[..., out]` of `out_dtype`.
    """
    check_activation_grid(xq, x_scale, x_zero_point)
    _check_weight(wq, w_scale, w_zero_point, bits, group_size, xq.shape[-1])
    if bias is not None:
        check_broadcast("bias", bias, (*xq.shape[:-1], wq.shape[0]))
    dtype = grids.compute_dtype(out_dtype)
    x = xq.to(dtype) - x_zero_point.to(dtype)
    # bfloat16 represents all integers only up to 256, so an autocast product would drop bits of the codes.
    with torch.autocast(xq.device.type, enabled=False):
        if group_size == 0:
            weight = unpack(wq, bits, xq.shape[-1]).to(dtype) - w_zero_point.to(dtype)
            y = functional.linear(x, weight) * w_scale.to(dtype).flatten()
        else:
            weight = weights.dequantize_weight(wq, w_scale, w_zero_point, bits, group_size, xq.shape[-1], dtype)
            y = functional.linear(x, weight)
    y = y * x_scale.to(dtype)
    if bias is not None:
        y = y + bias.to(dtype)
    return y.to(out_dtype).contiguous()


def _fake_linear(
    xq: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    wq: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    out_dtype: torch.dtype,
) -> Tensor:
    check_activation_grid(xq, x_scale, x_zero_point)
    _check_weight(wq, w_scale, w_zero_point, bits, group_size, xq.shape[-1])
    if bias is not None:
        check_broadcast("bias", bias, (*xq.shape[:-1], wq.shape[0]))
    return xq.new_empty((*xq.shape[:-1], wq.shape[0]), dtype=out_dtype)


def conv2d(
    xq: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    wq: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor,
    bias: Tensor | None,
    bits: int,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """The counterpart of :func:`linear` for convolutions; `xq` holds integers `[batch, in, height, width]`.

    `kernel` is `[in / groups, kernel height, kernel width]`. Each row of weight codes holds `prod(kernel)` of them,
    packed as `[out, packed_size(prod(kernel), bits)]`; `w_scale` and `w_zero_point` are `[out, 1]`. `groups` is the
    number of groups of the convolution. Padding adds real zeros, whose code is `x_zero_point`. `bias` is `[out]` or
    broadcasts to the result, which is `[batch, out, height, width]` of `out_dtype`.
    """
    check_activation_grid(xq, x_scale, x_zero_point)
    _check_weight(wq, w_scale, w_zero_point, bits, 0, math.prod(kernel))
    _check_conv_input(xq, kernel, groups)
    dtype = grids.compute_dtype(out_dtype)
    x = xq.to(dtype) - x_zero_point.to(dtype)
    weight = unpack(wq, bits, math.prod(kernel)).to(dtype) - w_zero_point.to(dtype)
    with torch.autocast(xq.device.type, enabled=False):
        y = functional.conv2d(x, weight.unflatten(1, kernel), None, stride, padding, dilation, groups)
    y = y * w_scale.to(dtype).reshape(-1, 1, 1) * x_scale.to(dtype)
    if bias is not None:
        y = y + (bias.reshape(-1, 1, 1) if bias.dim() == 1 else bias).to(dtype)
    return y.to(out_dtype).contiguous()


def _fake_conv2d(
    xq: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    wq: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor,
    bias: Tensor | None,
    bits: int,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    out_dtype: torch.dtype,
) -> Tensor:
    check_activation_grid(xq, x_scale, x_zero_point)
    _check_weight(wq, w_scale, w_zero_point, bits, 0, math.prod(kernel))
    _check_conv_input(xq, kernel, groups)
    sizes = [
        (xq.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[1 + i] - 1) - 1) // stride[i] + 1 for i in range(2)
    ]
    return xq.new_empty((xq.shape[0], wq.shape[0], *sizes), dtype=out_dtype)


def _check_conv_input(xq: Tensor, kernel: list[int], groups: int) -> None:
    if xq.dim() != 4 or xq.shape[1] != kernel[0] * groups:
        raise ConfigurationError(
            f"a convolution of kernel {kernel} in {groups} groups needs an input of shape "
            f"[batch, {kernel[0] * groups}, height, width], not {tuple(xq.shape)}."
        )


def _check_weight(wq: Tensor, scale: Tensor, zero_point: Tensor, bits: int, group_size: int, in_features: int) -> None:
    grid = (wq.shape[0], weights.group_count(in_features, group_size))
    size = packed_size(in_features, bits)
    if wq.dtype != torch.uint8 or wq.dim() != 2 or wq.shape[1] != size:
        raise ConfigurationError(
            f"a weight of {in_features} inputs and {bits} bits is packed as uint8 [out, {size}], "
            f"not {wq.dtype} {tuple(wq.shape)}."
        )
    for name, value in (("scale", scale), ("zero point", zero_point)):
        if tuple(value.shape) != grid:
            raise ConfigurationError(f"the {name} of this weight is [out, groups] = {grid}, not {tuple(value.shape)}.")


define(
    "dequantize_weight(Tensor wq, Tensor scale, Tensor zero_point, int bits, int group_size, int in_features, "
    "ScalarType dtype) -> Tensor",
    dequantize_weight,
    _fake_dequantize_weight,
)
define(
    "linear(Tensor xq, Tensor x_scale, Tensor x_zero_point, Tensor wq, Tensor w_scale, Tensor w_zero_point, "
    "Tensor? bias, int bits, int group_size, ScalarType out_dtype) -> Tensor",
    linear,
    _fake_linear,
)
define(
    "conv2d(Tensor xq, Tensor x_scale, Tensor x_zero_point, Tensor wq, Tensor w_scale, Tensor w_zero_point, "
    "Tensor? bias, int bits, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups, "
    "ScalarType out_dtype) -> Tensor",
    conv2d,
    _fake_conv2d,
)
