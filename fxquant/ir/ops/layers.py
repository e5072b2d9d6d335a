"""Operators of layers: dequantization of a packed weight, and products of codes with it."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from fxquant.errors import ConfigurationError
from fxquant.ir.ops.definition import check_broadcast, check_input_scales, check_parts, decode_input, define
from fxquant.numerics import grids, weights
from fxquant.numerics.formats import FORMATS, Scales, bits_of, is_integer
from fxquant.numerics.packing import packed_size, unpack


def dequantize_weight(
    wq: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    format: str,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
    global_scale: Tensor | None = None,
) -> Tensor:
    """The weight, `[out, in_features]` of `dtype`, from packed codes of a number format.

    `wq` is uint8 `[out, packed_size(in_features, bits)]`. `scale` and, if the format has zero points, `zero_point` are
    `[rows, groups]`; `group_size` is the number of input channels per group, 0 for one group per row. `rows` divides
    `out`. `global_scale` is 0-d, for formats that have one. For a linear whose activations stay float.
    """
    scales = _checked_weight(wq, Scales(scale, zero_point, global_scale), format, group_size, in_features)
    return weights.dequantize_weight(wq, scales, format, group_size, in_features, dtype).contiguous()


def _fake_dequantize_weight(
    wq: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    format: str,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
    global_scale: Tensor | None = None,
) -> Tensor:
    _checked_weight(wq, Scales(scale, zero_point, global_scale), format, group_size, in_features)
    return wq.new_empty((wq.shape[0], in_features), dtype=dtype)


def linear(
    xq: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    wq: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor | None,
    bias: Tensor | None,
    x_format: str,
    w_format: str,
    group_size: int,
    out_dtype: torch.dtype,
    x_global: Tensor | None = None,
    w_global: Tensor | None = None,
) -> Tensor:
    """A product of codes, scaled to real numbers.

    `xq` holds codes `[..., in]` as :func:`quantize` makes them; the weight is as for :func:`dequantize_weight`. `bias`
    broadcasts to the result: `[out]`, or `[batch, 1, out]` for one row per sample. The result is `[..., out]` of
    `out_dtype`.

    If both sides are integers, this is `x_scale * w_scale * sum_k (xq_k - x_zp) (wq_k - w_zp) + bias`, with exact sums
    if they fit the mantissa. With groups, `w_scale` and `w_zero_point` belong to the group of k and move into the sum.
    If one side has another format, both sides are decoded and multiplied in float32 (float64 for a float64 result).
    """
    x_scales = _checked_input(xq, Scales(x_scale, x_zero_point, x_global), x_format)
    w_scales = _checked_weight(wq, Scales(w_scale, w_zero_point, w_global), w_format, group_size, xq.shape[-1])
    if bias is not None:
        check_broadcast("bias", bias, (*xq.shape[:-1], wq.shape[0]))
    dtype = grids.compute_dtype(out_dtype)
    # bfloat16 represents all integers only up to 256, so an autocast product would drop bits of the codes.
    with torch.autocast(xq.device.type, enabled=False):
        if is_integer(x_format) and is_integer(w_format):
            y = _integer_product(xq, x_scales, wq, w_scales, w_format, group_size, dtype)
        else:
            x = decode_input(xq, x_scales, x_format, dtype)
            weight = weights.dequantize_weight(wq, w_scales, w_format, group_size, xq.shape[-1], dtype)
            y = functional.linear(x, weight)
    if bias is not None:
        y = y + bias.to(dtype)
    return y.to(out_dtype).contiguous()


def _integer_product(
    xq: Tensor, x_scales: Scales, wq: Tensor, w_scales: Scales, w_format: str, group_size: int, dtype: torch.dtype
) -> Tensor:
    assert x_scales.zero_point is not None and w_scales.zero_point is not None
    x = xq.to(dtype) - x_scales.zero_point.to(dtype)
    if group_size == 0 and len(w_scales.scale) == len(wq):
        weight = unpack(wq, bits_of(w_format), xq.shape[-1]).to(dtype) - w_scales.zero_point.to(dtype)
        y = functional.linear(x, weight) * w_scales.scale.to(dtype).flatten()
    else:
        weight = weights.dequantize_weight(wq, w_scales, w_format, group_size, xq.shape[-1], dtype)
        y = functional.linear(x, weight)
    return y * x_scales.scale.to(dtype)


def _fake_linear(
    xq: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    wq: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor | None,
    bias: Tensor | None,
    x_format: str,
    w_format: str,
    group_size: int,
    out_dtype: torch.dtype,
    x_global: Tensor | None = None,
    w_global: Tensor | None = None,
) -> Tensor:
    _checked_input(xq, Scales(x_scale, x_zero_point, x_global), x_format)
    _checked_weight(wq, Scales(w_scale, w_zero_point, w_global), w_format, group_size, xq.shape[-1])
    if bias is not None:
        check_broadcast("bias", bias, (*xq.shape[:-1], wq.shape[0]))
    return xq.new_empty((*xq.shape[:-1], wq.shape[0]), dtype=out_dtype)


def conv2d(
    xq: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    wq: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor | None,
    bias: Tensor | None,
    x_format: str,
    w_format: str,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """The counterpart of :func:`linear` for convolutions; `xq` holds codes `[batch, in, height, width]`.

    `kernel` is `[in / groups, kernel height, kernel width]`. Each row of weight codes holds `prod(kernel)` of them,
    packed as `[out, packed_size(prod(kernel), bits)]`; `w_scale` and `w_zero_point` are `[out, 1]`. `groups` is the
    number of groups of the convolution. Padding adds real zeros. `bias` is `[out]` or broadcasts to the result, which
    is `[batch, out, height, width]` of `out_dtype`. Formats with blocks or scales of scales are not possible here.
    """
    x_scales, w_scales = _checked_conv(xq, x_scale, x_zero_point, x_format, wq, w_scale, w_zero_point, w_format, kernel)
    _check_conv_input(xq, kernel, groups)
    dtype = grids.compute_dtype(out_dtype)
    # At scale 1, so that sums of integers are exact; the scales follow.
    x = FORMATS[x_format].decode(xq, _at_one(x_scales), dtype)
    codes = unpack(wq, bits_of(w_format), math.prod(kernel))
    weight = FORMATS[w_format].decode(codes, _at_one(w_scales), dtype)
    with torch.autocast(xq.device.type, enabled=False):
        y = functional.conv2d(x, weight.unflatten(1, kernel), None, stride, padding, dilation, groups)
    y = y * w_scale.to(dtype).reshape(-1, 1, 1) * x_scale.to(dtype)
    if bias is not None:
        y = y + (bias.reshape(-1, 1, 1) if bias.dim() == 1 else bias).to(dtype)
    return y.to(out_dtype).contiguous()


def _fake_conv2d(
    xq: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    wq: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor | None,
    bias: Tensor | None,
    x_format: str,
    w_format: str,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    out_dtype: torch.dtype,
) -> Tensor:
    _checked_conv(xq, x_scale, x_zero_point, x_format, wq, w_scale, w_zero_point, w_format, kernel)
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


def _checked_conv(
    xq: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    x_format: str,
    wq: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor | None,
    w_format: str,
    kernel: list[int],
) -> tuple[Scales, Scales]:
    for format in (FORMATS[x_format], FORMATS[w_format]):
        if not format.plain_scales:
            raise ConfigurationError(
                f"a convolution has one scale per output channel and one for its input, and {format.name} needs others."
            )
    return (
        _checked_input(xq, Scales(x_scale, x_zero_point), x_format),
        _checked_weight(wq, Scales(w_scale, w_zero_point), w_format, 0, math.prod(kernel)),
    )


def _at_one(scales: Scales) -> Scales:
    return Scales(scales.scale.new_ones(()), scales.zero_point)


def _checked_input(xq: Tensor, scales: Scales, format: str) -> Scales:
    """The scales of an input, if they fit its codes and its format."""
    check_parts(FORMATS[format], scales, "input")
    check_input_scales(xq, scales, format)
    return scales


def _checked_weight(wq: Tensor, scales: Scales, format: str, group_size: int, in_features: int) -> Scales:
    """The scales of a weight, if they fit its codes and its format."""
    kind = FORMATS[format]
    check_parts(kind, scales, "weight")
    weights.check_block(kind, group_size)
    groups = weights.group_count(in_features, group_size)
    size = packed_size(in_features, kind.bits)
    if wq.dtype != torch.uint8 or wq.dim() != 2 or wq.shape[1] != size:
        raise ConfigurationError(
            f"a weight of {in_features} inputs and {kind.bits} bits is packed as uint8 [out, {size}], "
            f"not {wq.dtype} {tuple(wq.shape)}."
        )
    for name, value in (("scale", scales.scale), ("zero point", scales.zero_point)):
        if value is None:
            continue
        rows, out = value.shape[0] if value.dim() == 2 else 0, wq.shape[0]
        fits = rows == out or (isinstance(rows, int) and isinstance(out, int) and rows > 0 and out % rows == 0)
        if value.dim() != 2 or value.shape[1] != groups or not fits:
            grid = (wq.shape[0], groups)
            raise ConfigurationError(f"the {name} of this weight is [out, groups] = {grid}, not {tuple(value.shape)}.")
    return scales


define(
    "dequantize_weight(Tensor wq, Tensor scale, Tensor? zero_point, str format, int group_size, int in_features, "
    "ScalarType dtype, Tensor? global_scale=None) -> Tensor",
    dequantize_weight,
    _fake_dequantize_weight,
)
define(
    "linear(Tensor xq, Tensor x_scale, Tensor? x_zero_point, Tensor wq, Tensor w_scale, Tensor? w_zero_point, "
    "Tensor? bias, str x_format, str w_format, int group_size, ScalarType out_dtype, Tensor? x_global=None, "
    "Tensor? w_global=None) -> Tensor",
    linear,
    _fake_linear,
)
define(
    "conv2d(Tensor xq, Tensor x_scale, Tensor? x_zero_point, Tensor wq, Tensor w_scale, Tensor? w_zero_point, "
    "Tensor? bias, str x_format, str w_format, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups, "
    "ScalarType out_dtype) -> Tensor",
    conv2d,
    _fake_conv2d,
)
