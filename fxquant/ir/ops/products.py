"""The operator for products of two activations, such as the two products of attention."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.errors import ConfigurationError
from fxquant.ir.ops.definition import check_broadcast, check_input_scales, check_parts, define
from fxquant.numerics import grids
from fxquant.numerics.formats import FORMATS, Scales


def matmul(
    aq: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor | None,
    bq: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor | None,
    a_format: str,
    b_format: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """A product of codes, scaled to real numbers.

    For integers it is `a_scale * b_scale * sum_k (aq_ik - a_zp) (bq_kj - b_zp)`.

    `aq` holds codes `[..., m, k]`, `bq` codes `[..., k, n]`; leading axes broadcast as in `torch.matmul`. A scale must
    not depend on k: the scale of `aq` is 0-d or has size 1 in the last axis, the scale of `bq` is 0-d or has size 1
    in the second-to-last axis. So formats with blocks are not possible. The result is `[..., m, n]` of `out_dtype`.
    """
    sides = _checked_factors(aq, a_scale, a_zero_point, bq, b_scale, b_zero_point, a_format, b_format)
    dtype = grids.compute_dtype(out_dtype)
    # At scale 1, so that sums of integers are exact; the scales follow.
    a, b = (
        FORMATS[format].decode(codes, Scales(scales.scale.new_ones(()), scales.zero_point), dtype)
        for codes, scales, format in zip((aq, bq), sides, (a_format, b_format), strict=True)
    )
    # bfloat16 represents all integers only up to 256, so an autocast product would drop bits of the codes.
    with torch.autocast(aq.device.type, enabled=False):
        y = torch.matmul(a, b)
    return (y * a_scale.to(dtype) * b_scale.to(dtype)).to(out_dtype).contiguous()


def _fake_matmul(
    aq: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor | None,
    bq: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor | None,
    a_format: str,
    b_format: str,
    out_dtype: torch.dtype,
) -> Tensor:
    _checked_factors(aq, a_scale, a_zero_point, bq, b_scale, b_zero_point, a_format, b_format)
    leading = torch.broadcast_shapes(aq.shape[:-2], bq.shape[:-2])
    return aq.new_empty((*leading, aq.shape[-2], bq.shape[-1]), dtype=out_dtype)


def _checked_factors(
    aq: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor | None,
    bq: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor | None,
    a_format: str,
    b_format: str,
) -> tuple[Scales, Scales]:
    for what, codes, name in (("left", aq, a_format), ("right", bq, b_format)):
        if codes.is_floating_point() or codes.dim() < 2:
            raise ConfigurationError(
                f"the {what} factor of a product is integer codes of two axes or more, not {codes.dtype} "
                f"{tuple(codes.shape)}."
            )
        format = FORMATS[name]
        if not format.plain_scales:
            raise ConfigurationError(
                f"the {what} factor of a product has one scale per row or column, and {name} needs others."
            )
    inner = aq.shape[-1], bq.shape[-2]
    if all(isinstance(size, int) for size in inner) and inner[0] != inner[1]:
        raise ConfigurationError(f"{tuple(aq.shape)} and {tuple(bq.shape)} do not fit a matrix product.")
    left, right = Scales(a_scale, a_zero_point), Scales(b_scale, b_zero_point)
    check_parts(FORMATS[a_format], left, "left factor")
    check_parts(FORMATS[b_format], right, "right factor")
    check_input_scales(aq, left, a_format)
    for what, value in (("scale", b_scale), ("zero point", b_zero_point)):
        if value is not None:
            check_broadcast(what, value, (*bq.shape[:-2], 1, bq.shape[-1]))
    return left, right


define(
    "matmul(Tensor aq, Tensor a_scale, Tensor? a_zero_point, Tensor bq, Tensor b_scale, Tensor? b_zero_point, "
    "str a_format, str b_format, ScalarType out_dtype) -> Tensor",
    matmul,
    _fake_matmul,
)
