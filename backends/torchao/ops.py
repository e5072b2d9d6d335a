"""The operators of lowered graphs for which PyTorch has no single op, as `torch.ops.fxquant_torchao.*`.

All are composite: eagerly they run op by op, and under `torch.compile` they decompose into ATen ops, which inductor
and torchao's fusions can match.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import ScalingType

from fxquant.backends.torchao.weights import MIDDLE, fits_byte_kernel, four_bit_product, grid_of_four_bits
from fxquant.numerics import grids

_library = torch.library.Library("fxquant_torchao", "DEF")
FP8 = torch.float8_e4m3fn
_FLOATS = 16  # Products of 8-bit floats on GPUs need multiples of this many inputs and outputs.
_CUBLAS = 8  # Integer products of cuBLAS need multiples of this in every size, and more than twice as many rows.


def quantize_rows(x: Tensor, scale: Tensor, zero_point: Tensor, qmax: int) -> Tensor:
    """`fxquant::quantize` to uint8 codes of 0 to `qmax`, bit for bit, as ops that can be fused."""
    return grids.quantize(x, scale, zero_point, 0, qmax).to(torch.uint8)


def input_sums(xq: Tensor, scale: float, zero_point: int) -> Tensor:
    """`scale * sum_k (xq_k - zero_point)`, float32 `[..., 1]`, of codes `[..., in]`.

    The sum is exact: a sum of 65,793 codes fits the 24 bits of the mantissa.
    """
    return (xq.to(torch.float32).sum(-1, keepdim=True) - xq.shape[-1] * zero_point) * scale


def window_sums(
    xq: Tensor,
    scale: float,
    zero_point: int,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    out_channels: int,
) -> Tensor:
    """:func:`input_sums` over the inputs of each convolution output, float32 `[batch, out or 1, height, width]`."""
    values = xq.to(torch.float32) - zero_point
    by_group = values.unflatten(1, (groups, kernel[0])).sum(2)
    window = values.new_ones((groups, 1, *kernel[1:]))
    sums = functional.conv2d(by_group, window, None, stride, padding, dilation, groups) * scale
    return sums if groups == 1 else sums.repeat_interleave(out_channels // groups, 1)


def linear_rows(
    xq: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    w_sums: Tensor,
    w_excess: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """A linear whose input has a grid per row, or one grid given as tensors; integers are summed in 32 bits.

    `xq` is uint8 `[..., in]`, its scale and zero point broadcast to `[..., 1]`. `weight` is int8 `[out, in]` and
    `w_excess` float32 `[out]`, as :mod:`fxquant.backends.torchao.weights` holds them; `w_sums` is int32 `[out]`, the
    sums of the rows of `weight`. `bias` is `[out]` or broadcasts to the result, `[..., out]` of `out_dtype`.
    """
    rows = xq.reshape(-1, xq.shape[-1])
    scale, zero_point = (_by_row(value, xq) for value in (x_scale, x_zero_point))
    if xq.device.type == "cpu":
        factors = [rows, weight]
        if weight.shape[1] == 1:  # torch reads a single column with the wrong stride.
            factors = [functional.pad(factor, (0, 1)) for factor in factors]
        total = torch._int_mm(factors[0], factors[1].t())
    else:  # Both factors are int8.
        total = _cublas(rows, weight)
        zero_point = zero_point - MIDDLE
    w_step = w_scale.flatten()
    y = total.to(torch.float32) * scale * w_step
    y = y - (scale * zero_point) * (w_step * w_sums)
    if w_excess is not None:
        sums = rows.to(torch.float32).sum(-1, keepdim=True) - xq.shape[-1] * _by_row(x_zero_point, xq)
        y = y - sums * scale * w_excess
    y = y.reshape(*xq.shape[:-1], weight.shape[0])
    return (y if bias is None else y + bias).to(out_dtype)


def quantize_floats(x: Tensor, scale: Tensor) -> Tensor:
    """`fxquant::quantize` to the format ``fp8``, bit for bit, as float8_e4m3fn and as ops that can be fused."""
    dtype = grids.compute_dtype(x.dtype)
    most = torch.finfo(FP8).max
    return (x.to(dtype) / scale.to(dtype)).clamp(-most, most).to(FP8)


def linear_of_floats(
    xq: Tensor, x_scale: Tensor, weight: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """A linear of 8-bit floats, summed in float32.

    `xq` is float8_e4m3fn `[..., in]`, its scale broadcasts to `[..., 1]`. `weight` is float8_e4m3fn `[out, in]` with
    scales `[out, 1]`. `bias` is `[out]` or broadcasts to the result, `[..., out]` of `out_dtype`.
    """
    rows, w_rows = xq.reshape(-1, xq.shape[-1]), weight
    if xq.device.type == "cpu" or out_dtype == torch.bfloat16:
        y = _rowwise(rows, _by_row(x_scale, xq), w_rows, w_scale, out_dtype)
    else:  # On GPUs the product with a scale per row gives bfloat16.
        one = torch.ones((), device=xq.device)
        y = _scaled(rows, one, w_rows, one, ScalingType.TensorWise, torch.float32)
        y = y * _by_row(x_scale, xq) * w_scale.flatten()
    y = y.reshape(*xq.shape[:-1], weight.shape[0])
    return (y if bias is None else y + bias).to(out_dtype)


def linear_of_bytes(x: Tensor, weight: Tensor, w_scale: Tensor, w_excess: Tensor | None, bias: Tensor | None) -> Tensor:
    """A linear of float `x` `[..., in]` and an int8 weight as in :func:`linear_rows`; the result has the dtype of `x`.

    For 16-bit floats on CPUs a kernel unpacks the weight while it multiplies. Otherwise it is dequantized first.
    """
    dtype = grids.compute_dtype(x.dtype)
    halves = x.dtype in (torch.bfloat16, torch.float16)
    if x.device.type != "cpu" or not halves or not fits_byte_kernel(x.shape[-1]):
        values = weight.to(dtype) * w_scale.to(dtype)
        if w_excess is not None:
            values = values - w_excess.to(dtype).unsqueeze(1)
        return functional.linear(x, values.to(x.dtype), bias)
    y = torch._weight_int8pack_mm(x.reshape(-1, x.shape[-1]), weight, w_scale.flatten().to(x.dtype))
    y = y.reshape(*x.shape[:-1], weight.shape[0])
    if w_excess is not None:
        y = (y - x.to(dtype).sum(-1, keepdim=True) * w_excess).to(x.dtype)
    return y if bias is None else y + bias


def linear_of_nibbles(
    x: Tensor, weight: Tensor, w_scale: Tensor, w_zero_point: Tensor, bits: int, group: int, bias: Tensor | None
) -> Tensor:
    """A linear of float `x` `[..., in]` and a weight of up to 4 bits, as :func:`weights.four_bits` holds it.

    `w_scale` and `w_zero_point` are `[out, groups]`; `group` is the number of inputs per group of the kernel. `x` is
    bfloat16 or float16, and the grid is rounded to this dtype.
    """
    grid = grid_of_four_bits(w_scale, w_zero_point, bits, x.shape[-1] // group // w_scale.shape[1])
    y = four_bit_product(x.reshape(-1, x.shape[-1]), weight, group, grid.to(x.dtype).contiguous())
    y = y.reshape(*x.shape[:-1], w_scale.shape[0])
    return y if bias is None else y + bias


def _by_row(value: Tensor, xq: Tensor) -> Tensor:
    """Scale or zero point of the rows, float32 `[rows, 1]`, or `[1, 1]` if the rows share it."""
    value = value.to(torch.float32)
    if value.dim() == 0:
        return value.reshape(1, 1)
    return value.expand(*xq.shape[:-1], 1).reshape(-1, 1)


def _cublas(rows: Tensor, weight: Tensor) -> Tensor:
    """`(rows - 128) weight^T` in int32, of uint8 rows and an int8 weight on an NVIDIA GPU."""
    count, (out, features) = rows.shape[0], weight.shape
    wide = -features % _CUBLAS
    codes = functional.pad((rows ^ MIDDLE).view(torch.int8), (0, wide, 0, max(0, 2 * _CUBLAS + 1 - count)))
    weight = functional.pad(weight, (0, wide, 0, -out % _CUBLAS))
    return torch._int_mm(codes, weight.t())[:count, :out]


def _rowwise(rows: Tensor, scale: Tensor, weight: Tensor, w_scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    """The product of 8-bit floats with a scale per row of both sides, in a dtype that the kernels write."""
    dtype = out_dtype if out_dtype in (torch.bfloat16, torch.float16) else torch.float32
    scales = scale.expand(rows.shape[0], 1).contiguous(), w_scale.reshape(1, -1)
    return _scaled(rows, scales[0], weight, scales[1], ScalingType.RowWise, dtype)


def _scaled(
    rows: Tensor, scale: Tensor, weight: Tensor, w_scale: Tensor, recipe: ScalingType, dtype: torch.dtype
) -> Tensor:
    out, wide = weight.shape[0], -rows.shape[1] % _FLOATS
    if rows.device.type != "cpu" and (wide or out % _FLOATS):
        rows, weight = _padded(rows, wide, 0), _padded(weight, wide, -out % _FLOATS)
        w_scale = w_scale if recipe == ScalingType.TensorWise else functional.pad(w_scale, (0, -out % _FLOATS))
    y = functional.scaled_mm(rows, weight.t(), scale, recipe, w_scale, recipe, output_dtype=dtype)
    return y.narrow(1, 0, out)


def _padded(values: Tensor, columns: int, rows: int) -> Tensor:
    return functional.pad(values.view(torch.uint8), (0, columns, 0, rows)).view(FP8)


def input_sums_of_grid(xq: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """:func:`input_sums` with the grid as 0-d tensors."""
    return (xq.to(torch.float32).sum(-1, keepdim=True) - xq.shape[-1] * zero_point) * scale


def _define(schema: str, kernel: Callable[..., Tensor]) -> None:
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(schema.partition("(")[0], kernel, "CompositeImplicitAutograd")


_define("quantize_rows(Tensor x, Tensor scale, Tensor zero_point, int qmax) -> Tensor", quantize_rows)
_define("input_sums(Tensor xq, float scale, int zero_point) -> Tensor", input_sums)
_define("input_sums_of_grid(Tensor xq, Tensor scale, Tensor zero_point) -> Tensor", input_sums_of_grid)
_define(
    "window_sums(Tensor xq, float scale, int zero_point, int[] kernel, int[] stride, int[] padding, int[] dilation, "
    "int groups, int out_channels) -> Tensor",
    window_sums,
)
_define(
    "linear_rows(Tensor xq, Tensor x_scale, Tensor x_zero_point, Tensor weight, Tensor w_scale, Tensor w_sums, "
    "Tensor? w_excess, Tensor? bias, ScalarType out_dtype) -> Tensor",
    linear_rows,
)
_define("quantize_floats(Tensor x, Tensor scale) -> Tensor", quantize_floats)
_define(
    "linear_of_floats(Tensor xq, Tensor x_scale, Tensor weight, Tensor w_scale, Tensor? bias, ScalarType out_dtype) -> "
    "Tensor",
    linear_of_floats,
)
_define(
    "linear_of_bytes(Tensor x, Tensor weight, Tensor w_scale, Tensor? w_excess, Tensor? bias) -> Tensor",
    linear_of_bytes,
)
_define(
    "linear_of_nibbles(Tensor x, Tensor weight, Tensor w_scale, Tensor w_zero_point, int bits, int group, "
    "Tensor? bias) -> Tensor",
    linear_of_nibbles,
)
