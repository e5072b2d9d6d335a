"""Rounding of activations to a number format, as quantized graphs do it at run time, for measurements on samples."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.numerics.formats import Format, Scales


def round_in_range(x: Tensor, format: Format, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Round values on the scale of one range for all of them.

    Blocks of channels find their own scales; the range then gives the scale of these scales, if the format has one.

    Args:
        x: Values ``[..., channels]``, any float dtype.
        format: Their number format.
        low: Lowest value of the range, 0-d or a number.
        high: Highest value.

    Raises:
        ConfigurationError: The format has blocks that do not divide the channels.
    """
    lowest, highest = (torch.as_tensor(end, dtype=torch.float64) for end in (low, high))
    if format.block:
        return _by_block(x, format, format.global_scale(lowest, highest))
    return format.round(x, format.scales(lowest, highest))


def round_by_token(x: Tensor, format: Format) -> Tensor:
    """Round values on scales that each token, the last axis, finds for itself."""
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    if format.block:
        return _by_block(x, format, format.global_scale(low, high))
    return format.round(x, format.scales(low, high))


def _by_block(x: Tensor, format: Format, global_scale: Tensor | None) -> Tensor:
    blocks = x.unflatten(-1, (-1, format.block))
    outer = None if global_scale is None else global_scale.to(x.device)
    scale = format.scales(*torch.aminmax(blocks, dim=-1), global_scale=outer).scale
    outer = None if outer is None else outer[..., None]
    return format.round(blocks, Scales(scale[..., None], None, outer)).flatten(-2)
