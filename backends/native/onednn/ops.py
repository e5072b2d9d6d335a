"""The operators of products by oneDNN.

Products are single ops. The ops around them are composite: eagerly they run op by op, and under `torch.compile` they
decompose into ATen ops, which inductor fuses with their neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.backends.native.library import define_composite, define_kernel
from fxquant.backends.native.onednn.products import Gelu, Grid, product, product_of_rows


def input_sums(xq: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """`scale * sum_k (xq_k - zero_point)`, float32 `[..., 1]`, of codes `[..., in]`.

    The sum is exact: a sum of 65,793 codes fits the 24 bits of the mantissa.
    """
    total = xq.to(torch.float32).sum(-1, keepdim=True) - xq.shape[-1] * zero_point.to(torch.float32)
    return total * scale.to(torch.float32)


def add_missing(y: Tensor, sums: Tensor, offset: Tensor, dtype: torch.dtype) -> Tensor:
    """`y + sums * offset` in `dtype`, of float32 `[..., out]`, `[..., 1]` and `[out]`."""
    if type(y) is Tensor:
        return torch.addcmul(y, sums, offset).to(dtype)
    return (y + sums * offset).to(dtype)  # In tracing: the fake kernel of addcmul does not support a symbolic batch.


def linear(
    xq: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor,
    w_sums: Tensor | None,
    bias: Tensor | None,
    bits: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """`x_scale * w_scale * sum_k (xq_k - x_zero_point) weight_k + bias`, summed in 32-bit integers.

    `xq` is uint8 `[..., in]`. `weight` is int8 `[in, out]` as :mod:`fxquant.backends.native.onednn.weights` holds it.
    `w_zero_point` and `bits` are not used in the computation; they are kept to recover the codes of the weight. Without
    `w_sums`, scale and zero point of `xq` are one number, or one per sample along the first axis. With `w_sums`, int32
    `[out]`, they may be one per row, `[..., 1]`. `bias` is `[out]`, or one row per sample. The result is `[..., out]`
    of `out_dtype`.
    """
    if w_sums is not None:
        return product_of_rows(xq, x_scale, x_zero_point, weight, w_scale, w_sums, bias).to(out_dtype)
    kernel_dtype = torch.float32 if out_dtype == torch.float64 else out_dtype
    return product(xq, Grid(x_scale, x_zero_point), weight, w_scale, bias, kernel_dtype).to(out_dtype)


def _fake_linear(
    xq: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor,
    w_sums: Tensor | None,
    bias: Tensor | None,
    bits: int,
    out_dtype: torch.dtype,
) -> Tensor:
    return xq.new_empty((*xq.shape[:-1], weight.shape[1]), dtype=out_dtype)


def linear_gelu(
    xq: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor,
    bias: Tensor | None,
    bits: int,
    out_scale: Tensor,
    out_zero_point: Tensor,
    qmax: int,
) -> Tensor:
    """:func:`linear`, GELU by the tanh formula, and quantization to uint8 codes of 0 to `qmax`, in one kernel.

    Scales and zero points are one number, or one per sample.
    """
    gelu = Gelu(Grid(out_scale, out_zero_point), qmax)
    return product(xq, Grid(x_scale, x_zero_point), weight, w_scale, bias, torch.float32, gelu)


def _fake_linear_gelu(
    xq: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor,
    bias: Tensor | None,
    bits: int,
    out_scale: Tensor,
    out_zero_point: Tensor,
    qmax: int,
) -> Tensor:
    return xq.new_empty((*xq.shape[:-1], weight.shape[1]), dtype=torch.uint8)


define_composite("input_sums(Tensor xq, Tensor scale, Tensor zero_point) -> Tensor", input_sums)
define_composite("add_missing(Tensor y, Tensor sums, Tensor offset, ScalarType dtype) -> Tensor", add_missing)
define_kernel(
    "linear(Tensor xq, Tensor x_scale, Tensor x_zero_point, Tensor weight, Tensor w_scale, Tensor w_zero_point, "
    "Tensor? w_sums, Tensor? bias, int bits, ScalarType out_dtype) -> Tensor",
    linear,
    _fake_linear,
)
define_kernel(
    "linear_gelu(Tensor xq, Tensor x_scale, Tensor x_zero_point, Tensor weight, Tensor w_scale, Tensor w_zero_point, "
    "Tensor? bias, int bits, Tensor out_scale, Tensor out_zero_point, int qmax) -> Tensor",
    linear_gelu,
    _fake_linear_gelu,
)
