"""GPTQ: rounds the weights of one input channel after the other and compensates the error in the later channels.

E. Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (arXiv
2210.17323). With inputs x of second moments H = E[x x^T], rounding W to Q causes the output error
tr((W - Q) H (W - Q)^T). For the input channels in some order, let H^-1 = U^T U with U upper triangular. Let e_i be
column i minus its rounded values. The least error remains if every later column j moves by -e_i U_ij / U_ii.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.errors import ConfigurationError
from fxquant.numerics.formats import FORMATS, Scales
from fxquant.numerics.ranges import RangeMethod
from fxquant.numerics.rounding.feedback import ErrorFeedback, blocks
from fxquant.numerics.weights import QuantizedWeight, group_count, weight_scales


def gptq(
    weight: Tensor,
    feedback: ErrorFeedback,
    *,
    format: str,
    group_size: int = 0,
    group_rows: int = 1,
    symmetric: bool = False,
    method: RangeMethod = "minmax",
) -> QuantizedWeight:
    """Round a weight so that the error of the layer's output is small.

    The scales are those of rounding to nearest, computed from the original weight. Time is O(out in^2), or
    O(out in T) with the factor of T rows.

    Args:
        weight: ``[out, in]``, any float dtype, finite.
        feedback: The error feedback for the inputs of the layer.
        format: Name of the number format. The scales are fixed before the first element is rounded.
        group_size: Input channels that share a grid; 0 for all of them.
        group_rows: Output channels that share a scale; 0 for all of them.
        symmetric: Fix zero points at ``2**(bits - 1)``.
        method: How the ranges are chosen, weighted by the mean squares of the inputs; see
            :func:`fxquant.numerics.ranges.weight_range`.

    Raises:
        ConfigurationError: As :func:`fxquant.numerics.weights.quantize_weight`, or if the number of inputs differs from
            the number of columns.
    """
    in_features = weight.shape[1]
    if len(feedback.order) != in_features:
        raise ConfigurationError(
            f"a weight of {in_features} input channels was given the moments of {len(feedback.order)} channels."
        )
    groups = group_count(in_features, group_size)
    kind = FORMATS[format]
    scales = weight_scales(
        weight.detach().to(torch.float32),
        format=format,
        group_size=group_size,
        group_rows=group_rows,
        symmetric=symmetric,
        method=method,
        importance=None if method == "minmax" else feedback.importance.to(weight.device),
    )

    order = feedback.order.to(weight.device)
    group_of = (order // (in_features // groups)).tolist()
    # Input channels first: each step works on one row and on the rows after it.
    left = weight.detach().to(torch.float32).T[order].contiguous()
    grids = _by_group(scales, weight.shape[0])
    propagation = feedback.factor.propagation(left)
    for start, stop in blocks(in_features):
        block, inner = left[start:stop], propagation.enter(start, stop)
        errors = torch.empty_like(block)
        for i in range(stop - start):
            grid = grids[group_of[start + i]]
            rounded = kind.round(block[i], grid)
            torch.sub(block[i], rounded, out=errors[i])
            block[i] = rounded
            errors[i] /= inner[i, i]
            block[i + 1 :].addr_(inner[i, i + 1 :], errors[i], alpha=-1.0)
        propagation.leave(start, stop, errors)
    placed = torch.empty_like(left)
    placed[order] = left  # Values of the grid, whose codes are found once for all.
    parts = [kind.encode(part, grid) for part, grid in zip(placed.chunk(groups), grids, strict=True)]
    return QuantizedWeight.from_codes(torch.cat(parts).T.contiguous(), scales, format=format, group_size=group_size)


def _by_group(scales: Scales, out_features: int) -> list[Scales]:
    """The scales of each group of input channels, ``[out]``."""

    def split(grid: Tensor) -> list[Tensor]:
        each = grid.repeat_interleave(out_features // max(1, len(grid)), 0)
        return list(each.T.contiguous().unbind())

    steps = split(scales.scale)
    zeros = [None] * len(steps) if scales.zero_point is None else split(scales.zero_point)
    return [Scales(step, zero, scales.global_scale) for step, zero in zip(steps, zeros, strict=True)]
