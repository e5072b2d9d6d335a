"""The operator for products of two activations, such as the two products of attention."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.errors import ConfigurationError
from fxquant.ir.ops.definition import check_activation_grid, check_broadcast, define
from fxquant.numerics import grids


def matmul(
    aq: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor,
    bq: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    """An integer product, scaled to real numbers: `a_scale * b_scale * sum_k (aq_ik - a_zp) (bq_kj - b_zp)`.

    `aq` holds integers `[..., m, k]`, `bq` integers `[..., k, n]`; leading axes broadcast as in `torch.matmul`. A grid
    must not depend on k: the grid of `aq` is 0-d or has size 1 in the last axis, the grid of `bq` is 0-d or has size 1
    in the second-to-last axis. The result is `[..., m, n]` of `out_dtype`.
    """
    _check_factors(aq, a_scale, a_zero_point, bq, b_scale, b_zero_point)
    dtype = grids.compute_dtype(out_dtype)
    a = aq.to(dtype) - a_zero_point.to(dtype)
    b = bq.to(dtype) - b_zero_point.to(dtype)
    # bfloat16 represents all integers only up to 256, so an autocast product would drop bits of the codes.
    with torch.autocast(aq.device.type, enabled=False):
        y = torch.matmul(a, b)
    return (y * a_scale.to(dtype) * b_scale.to(dtype)).to(out_dtype).contiguous()


def _fake_matmul(
    aq: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor,
    bq: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    _check_factors(aq, a_scale, a_zero_point, bq, b_scale, b_zero_point)
    leading = torch.broadcast_shapes(aq.shape[:-2], bq.shape[:-2])
    return aq.new_empty((*leading, aq.shape[-2], bq.shape[-1]), dtype=out_dtype)


def _check_factors(
    aq: Tensor, a_scale: Tensor, a_zero_point: Tensor, bq: Tensor, b_scale: Tensor, b_zero_point: Tensor
) -> None:
    for what, codes in (("left", aq), ("right", bq)):
        if codes.is_floating_point() or codes.dim() < 2:
            raise ConfigurationError(
                f"the {what} factor of a product is integer codes of two axes or more, not {codes.dtype} "
                f"{tuple(codes.shape)}."
            )
    inner = aq.shape[-1], bq.shape[-2]
    if all(isinstance(size, int) for size in inner) and inner[0] != inner[1]:
        raise ConfigurationError(f"{tuple(aq.shape)} and {tuple(bq.shape)} do not fit a matrix product.")
    check_activation_grid(aq, a_scale, a_zero_point)
    for what, value in (("scale", b_scale), ("zero point", b_zero_point)):
        check_broadcast(what, value, (*bq.shape[:-2], 1, bq.shape[-1]))


define(
    "matmul(Tensor aq, Tensor a_scale, Tensor a_zero_point, Tensor bq, Tensor b_scale, Tensor b_zero_point, "
    "ScalarType out_dtype) -> Tensor",
    matmul,
    _fake_matmul,
)
