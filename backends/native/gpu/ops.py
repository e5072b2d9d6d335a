"""The operators of the Triton kernels: schemas, shapes and dtypes of results, and the functions that run them.

Codes of activations are int8: the code of the plan, 0 to 255, minus 128, because tensor cores multiply signed bytes.
Or they are 8-bit floats (e4m3), those of the format ``fp8``, which have no zero points. Scales and zero points are
those of the plan. There is one grid for all, one per sample along the first axis, or one per row. The arguments have
the same order as those of the compiled kernels for CPUs, so that the same patterns fuse into both.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fxquant.backends.native.gpu import blocks, float_weights, products, rotations, rows, weight_only
from fxquant.backends.native.gpu.arguments import FP8
from fxquant.backends.native.library import define_composite, define_kernel, fake_weight_only_linear
from fxquant.numerics.formats import FORMATS

_DEVICES = ("CUDA", "CPU")  # On CPUs kernels run in Triton's interpreter.


def _fake_linear(xq: Tensor, *arguments: Any) -> Tensor:
    out_features, out_scale, out_dtype = (arguments[position] for position in (8, 12, 15))
    # The next linear multiplies the same dtype as this one: 8-bit codes, or 8-bit floats.
    return xq.new_empty((*xq.shape[:-1], out_features), dtype=out_dtype if out_scale is None else xq.dtype)


def _fake_linear_sums(xq: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return _fake_linear(xq, *arguments), _fake_row_sums(xq)


def _fake_norm_quantize(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=arguments[10])


def _fake_norm_quantize_sums(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return _fake_norm_quantize(x, *arguments), _fake_row_sums(x)


def _fake_norm_quantize_tokens(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _fake_quantize_tokens(x, *arguments[7:])


def _fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, qmax: int, dtype: torch.dtype, *_: Any
) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _fake_quantize_sums(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return _fake_quantize(x, *arguments), _fake_row_sums(x)


def _fake_quantize_tokens(x: Tensor, qmax: int, dtype: torch.dtype, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    each = (*x.shape[:-1], 1)
    scale, zero_point = (x.new_empty(each, dtype=part) for part in (torch.float32, torch.uint8))
    return x.new_empty(x.shape, dtype=dtype), scale, zero_point, _fake_row_sums(x)


def _fake_quantize_blocks(
    x: Tensor, format: str, global_scale: Tensor | None = None, signs: Tensor | None = None, block: int = 1
) -> tuple[Tensor, Tensor]:
    channels, leading = x.shape[-1], x.shape[:-1]
    dtype = FP8 if FORMATS[format].bits == 8 else torch.uint8
    rows = math.prod(leading)
    scales = x.new_empty((blocks.scale_bytes(rows, channels, format),), dtype=torch.uint8)
    return x.new_empty((*leading, blocks.held_bytes(channels, format)), dtype=dtype), scales


def _fake_scaled_linear(codes: Tensor, *arguments: Any) -> Tensor:
    out_features, dtype = arguments[8:10]
    return codes.new_empty((*codes.shape[:-1], out_features), dtype=dtype)


def _fake_hadamard(x: Tensor, signs: Tensor, block: int) -> Tensor:
    return x.new_empty(x.shape)


def _fake_row_sums(xq: Tensor) -> Tensor:
    return xq.new_empty((*xq.shape[:-1], 1), dtype=torch.int32)


# `x_scale * w_scale * sum_k (xq_k - x_zero_point) (w_k - w_zero_point) + bias`, summed exactly; then the activation
# ("none", "gelu_tanh", "silu"); then either codes on the grid out_scale, out_zero_point, or times gate, plus residual.
# gate and bias are vectors over the output channels, one for all or one per sample. With groups, sums are exact within
# each group and groups are added up in float32. w_offset holds zero points that are not yet subtracted from the stored
# weight; it requires x_sums, the row sums of xq. A branch of low rank adds inner, `[..., rank]`, times up,
# `[out, rank]`, before the bias.
_LINEAR = (
    "Tensor xq, Tensor x_scale, Tensor? x_zero_point, Tensor weight, Tensor w_scale, Tensor? w_zero_point, "
    "Tensor? w_sums, Tensor? bias, int bits, int out_features, str activation, Tensor? gate, Tensor? residual, "
    "Tensor? out_scale, Tensor? out_zero_point, int qmax, ScalarType out_dtype, int group_size, Tensor? w_offset, "
    "Tensor? x_sums, Tensor? inner=None, Tensor? up=None"
)
define_kernel(f"triton_linear({_LINEAR}) -> Tensor", products.linear, _fake_linear, _DEVICES)
# triton_linear that also returns the sums of the codes.
define_kernel(f"triton_linear_sums({_LINEAR}) -> (Tensor, Tensor)", products.linear_sums, _fake_linear_sums, _DEVICES)
# x times the weight `w_scale * (w - w_zero_point)`, with grids `[out, groups]`, plus bias, summed in float32.
define_kernel(
    "triton_weight_only_linear(Tensor x, Tensor weight, Tensor w_scale, Tensor w_zero_point, Tensor? bias, int bits, "
    "int group_size, int out_features) -> Tensor",
    weight_only.weight_only_linear,
    fake_weight_only_linear,
    _DEVICES,
)
# x times a weight in a float format, with scales `[out, groups]` as they are stored, plus bias, summed in float32.
define_kernel(
    "triton_float_weight_linear(Tensor x, Tensor weight, Tensor w_scale, Tensor? global_scale, Tensor? bias, "
    "str format, int group_size, int out_features) -> Tensor",
    float_weights.float_weight_linear,
    fake_weight_only_linear,
    _DEVICES,
)
# Codes of `norm(x) * weight + bias`, times `factor + plus`, plus shift; factor and shift are vectors over the channels,
# one for all or one per sample. The norm is the layer norm if centered, otherwise the RMS norm. `*_sums` also return
# the sums of the codes, which linears need if their weights have zero points; `*_tokens` compute a grid for each row,
# and return codes, scales, zero points and sums. With signs the channels are rotated before they become codes.
_NORM = "bool centered, float eps, Tensor? weight, Tensor? bias, Tensor? factor, float plus, Tensor? shift"
_TURN = "Tensor? signs=None, int block=1"
_CODES = f"Tensor scale, Tensor? zero_point, int qmax, ScalarType dtype, {_TURN}"
define_kernel(
    f"triton_norm_quantize(Tensor x, {_NORM}, {_CODES}) -> Tensor",
    rows.norm_quantize,
    _fake_norm_quantize,
    _DEVICES,
)
define_kernel(
    f"triton_norm_quantize_sums(Tensor x, {_NORM}, {_CODES}) -> (Tensor, Tensor)",
    rows.norm_quantize_sums,
    _fake_norm_quantize_sums,
    _DEVICES,
)
define_kernel(
    f"triton_norm_quantize_tokens(Tensor x, {_NORM}, int qmax, ScalarType dtype, {_TURN}) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    rows.norm_quantize_tokens,
    _fake_norm_quantize_tokens,
    _DEVICES,
)
define_kernel(
    f"triton_quantize(Tensor x, {_CODES}) -> Tensor",
    rows.quantize,
    _fake_quantize,
    _DEVICES,
)
define_kernel(
    f"triton_quantize_sums(Tensor x, {_CODES}) -> (Tensor, Tensor)",
    rows.quantize_sums,
    _fake_quantize_sums,
    _DEVICES,
)
define_kernel(
    f"triton_quantize_tokens(Tensor x, int qmax, ScalarType dtype, {_TURN}) -> (Tensor, Tensor, Tensor, Tensor)",
    rows.quantize_tokens,
    _fake_quantize_tokens,
    _DEVICES,
)
# `(x * signs) H`, with Hadamard matrices of size block along the channels, summed in float32.
define_kernel(
    "triton_hadamard(Tensor x, Tensor signs, int block) -> Tensor", rotations.hadamard, _fake_hadamard, _DEVICES
)
# Codes and scales of block formats as fxquant::quantize and block_scale make them: codes as bytes, filled up with zeros
# at the end of rows, scales in the tiles that tensor cores read.
define_kernel(
    "triton_quantize_blocks(Tensor x, str format, Tensor? global_scale=None, Tensor? signs=None, int block=1) -> "
    "(Tensor, Tensor)",
    blocks.quantize_blocks,
    _fake_quantize_blocks,
    _DEVICES,
)
# The product of such codes with those of a weight, times scales and global scales, plus bias.
define_kernel(
    "scaled_linear(Tensor codes, Tensor scales, Tensor? x_global, Tensor weight, Tensor w_scales, Tensor? w_global, "
    "Tensor? bias, str format, int in_features, int out_features, ScalarType dtype) -> Tensor",
    blocks.scaled_linear,
    _fake_scaled_linear,
    _DEVICES,
)
# The sum of each row of codes as stored, int32 `[..., 1]`.
define_kernel("triton_row_sums(Tensor xq) -> Tensor", rows.row_sums, _fake_row_sums, _DEVICES)


def signed(xq: Tensor) -> Tensor:
    """Convert reference codes, uint8, to the form that kernels read: int8, stored minus 128."""
    return (xq ^ 128).view(torch.int8)


define_composite("signed(Tensor xq) -> Tensor", signed)
