"""The operators of the compiled kernels. Their code is in ``csrc``; this module has their schemas and fake kernels.

Scales and zero points of activations are one number, one per sample along the first axis, or one per row. Weights are
in panels (:mod:`fxquant.backends.native.compiled.weights`); ``bits`` is the number of bits of their codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxquant.backends.native.library import define_kernel, fake_weight_only_linear


def _fake_vnni_linear(
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
    inner: Tensor | None = None,
    up: Tensor | None = None,
    inner_from: int = 0,
    strength: Tensor | None = None,
    group_size: int = 0,
) -> Tensor:
    dtype = out_dtype if out_scale is None else torch.uint8
    return xq.new_empty((*xq.shape[:-1], out_features), dtype=dtype)


def _fake_vnni_linear_values(*arguments: Any) -> tuple[Tensor, Tensor]:
    codes = _fake_vnni_linear(*arguments)
    return codes, codes.new_empty(codes.shape, dtype=torch.bfloat16)


def _fake_norm_quantize(
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
) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.uint8)


def _fake_norm_quantize_down(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *_, out_scale, out_zero_point, qmax, downs, bf16 = arguments
    return _fake_quantize_down(x, out_scale, out_zero_point, qmax, downs, bf16)


def _fake_quantize_down(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmax: int, downs: Sequence[Tensor], bf16: bool
) -> tuple[Tensor, Tensor]:
    width = sum(inner_columns(down.shape[0]) for down in downs)
    inner = x.new_empty((*x.shape[:-1], width), dtype=torch.bfloat16 if bf16 else torch.float32)
    return x.new_empty(x.shape, dtype=torch.uint8), inner


def _fake_down(x: Tensor, downs: Sequence[Tensor]) -> Tensor:
    return x.new_empty((*x.shape[:-1], sum(inner_columns(down.shape[0]) for down in downs)))


def inner_columns(rank: int) -> int:
    """The columns that inner values of a branch occupy: its rank, up to the next multiple of four."""
    return -(-rank // 4) * 4


def _fake_hadamard(x: Tensor, signs: Tensor, block: int) -> Tensor:
    return x.new_empty(x.shape)


def _fake_hadamard_quantize(
    x: Tensor, signs: Tensor, block: int, out_scale: Tensor, out_zero_point: Tensor, qmax: int
) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.uint8)


def _attended(q: Tensor, v: Tensor, out_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    batch, heads, tokens, _ = q.shape
    return q.new_empty((batch, tokens, heads, v.shape[3]), dtype=dtype if out_scale is None else torch.uint8)


def _fake_bf16_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    out_scale: Tensor | None,
    out_zero_point: Tensor | None,
    qmax: int,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    return _attended(q, v, out_scale, out_dtype or q.dtype)


def _fake_bf16_attention_values(*arguments: Any) -> tuple[Tensor, Tensor]:
    codes = _fake_bf16_attention(*arguments)
    return codes, codes.new_empty(codes.shape, dtype=torch.bfloat16)


def _fake_int8_attention(
    q: Tensor,
    q_scale: Tensor,
    q_zero_point: Tensor,
    k: Tensor,
    k_scale: Tensor,
    k_zero_point: Tensor,
    v: Tensor,
    v_scale: Tensor,
    v_zero_point: Tensor,
    mask: Tensor | None,
    softmax_scale: Tensor,
    softmax_zero_point: Tensor,
    softmax_qmax: int,
    out_scale: Tensor | None,
    out_zero_point: Tensor | None,
    qmax: int,
    out_dtype: torch.dtype,
) -> Tensor:
    return _attended(q, v, out_scale, out_dtype)


# `x_scale * w_scale * sum_k (xq_k - x_zero_point) (w_k - w_zero_point) + bias`, summed exactly; plus a branch of low
# rank, `strength * up inner`, whose inner values begin at column `inner_from` of `inner`; then the activation
# ("none", "gelu_tanh", "silu"); then codes of the grid out_scale, out_zero_point, or times gate, plus residual.
# gate and bias are vectors over the output channels, one for all samples or one per sample.
# With group_size, the grid of the weight is `[groups, out]`, the sums of groups are added in float32, and w_sums are
# float32 and include the grid.
_LINEAR = (
    "Tensor xq, Tensor x_scale, Tensor x_zero_point, Tensor weight, Tensor w_scale, Tensor w_zero_point, "
    "Tensor w_sums, Tensor? bias, int bits, int out_features, str activation, Tensor? gate, Tensor? residual, "
    "Tensor? out_scale, Tensor? out_zero_point, int qmax, ScalarType out_dtype, Tensor? inner=None, Tensor? up=None, "
    "int inner_from=0, Tensor? strength=None, int group_size=0"
)
define_kernel(f"vnni_linear({_LINEAR}) -> Tensor", None, _fake_vnni_linear)
# Codes, and the values of the codes before rounding, in bfloat16.
define_kernel(f"vnni_linear_values({_LINEAR}) -> (Tensor, Tensor)", None, _fake_vnni_linear_values)
# x times the weight `w_scale * (w - w_zero_point)`, grids `[out, groups]`, plus bias, summed in float32.
define_kernel(
    "weight_only_linear(Tensor x, Tensor weight, Tensor w_scale, Tensor w_zero_point, Tensor? bias, int bits, "
    "int group_size, int out_features) -> Tensor",
    None,
    fake_weight_only_linear,
)
# x times a weight in a float format (of 4 bits: nf4, mxfp4, nvfp4; of 6 and 8 bits too), plus bias, summed in float32.
# Scales are `[panels, groups, 32]`, as they are stored: float32, or bytes of e8m0 or e4m3. Sums of more than a few rows
# of bfloat16 are those of weights that are rounded to bfloat16, as the reference rounds them.
define_kernel(
    "float_weight_linear(Tensor x, Tensor weight, Tensor w_scale, Tensor? global_scale, Tensor? bias, str format, "
    "int group_size, int out_features) -> Tensor",
    None,
    fake_weight_only_linear,
)
# Codes of `norm(x) * weight + bias`, times `factor + plus`, plus shift; factor and shift are vectors over the channels,
# one for all samples or one per sample. The norm is layer norm if centered, else RMS norm.
define_kernel(
    "norm_quantize(Tensor x, bool centered, float eps, Tensor? weight, Tensor? bias, Tensor? factor, float plus, "
    "Tensor? shift, Tensor out_scale, Tensor out_zero_point, int qmax) -> Tensor",
    None,
    _fake_norm_quantize,
)
# The same codes, and the inner values of branches of low rank: x as it is quantized times each of `downs`, [rank, in].
# The inner values of a branch start at a multiple of four columns. Products are of bfloat16, or else of float32.
define_kernel(
    "norm_quantize_down(Tensor x, bool centered, float eps, Tensor? weight, Tensor? bias, Tensor? factor, float plus, "
    "Tensor? shift, Tensor out_scale, Tensor out_zero_point, int qmax, Tensor[] downs, bool bf16) -> (Tensor, Tensor)",
    None,
    _fake_norm_quantize_down,
)
define_kernel(
    "quantize_down(Tensor x, Tensor scale, Tensor zero_point, int qmax, Tensor[] downs, bool bf16) -> (Tensor, Tensor)",
    None,
    _fake_quantize_down,
)
# The same inner values of bfloat16 rows, multiplied in bfloat16.
define_kernel("down(Tensor x, Tensor[] downs) -> Tensor", None, _fake_down)
# `(x * signs) H` in the dtype of x, as `fxquant::hadamard`, computed in float32.
define_kernel("hadamard(Tensor x, Tensor signs, int block) -> Tensor", None, _fake_hadamard)
# Codes of the same. The grid is one for all rows, one per sample or one per row.
define_kernel(
    "hadamard_quantize(Tensor x, Tensor signs, int block, Tensor out_scale, Tensor out_zero_point, int qmax) -> Tensor",
    None,
    _fake_hadamard_quantize,
)
# Attention of [batch, heads, tokens, channels]. The result is [batch, tokens, heads, channels], values or codes.
# A bool mask is true for keys that are seen; a float mask is added to the scores. Values have the dtype of q, or
# out_dtype: bfloat16 inputs can give float32 values.
_ATTENTION = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float scale, Tensor? out_scale, "
    "Tensor? out_zero_point, int qmax, ScalarType? out_dtype=None"
)
define_kernel(f"bf16_attention({_ATTENTION}) -> Tensor", None, _fake_bf16_attention)
# Codes, and the values of the codes before rounding, in bfloat16.
define_kernel(f"bf16_attention_values({_ATTENTION}) -> (Tensor, Tensor)", None, _fake_bf16_attention_values)
# The same for codes; the probabilities are codes 0..softmax_qmax of the grid softmax_scale.
define_kernel(
    "int8_attention(Tensor q, Tensor q_scale, Tensor q_zero_point, Tensor k, Tensor k_scale, Tensor k_zero_point, "
    "Tensor v, Tensor v_scale, Tensor v_zero_point, Tensor? mask, Tensor softmax_scale, Tensor softmax_zero_point, "
    "int softmax_qmax, Tensor? out_scale, Tensor? out_zero_point, int qmax, ScalarType out_dtype) -> Tensor",
    None,
    _fake_int8_attention,
)
