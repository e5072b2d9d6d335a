"""Refusal of NaN and infinity, and scaling of second moments into the range of float32 arithmetic."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from fxquant.errors import NonFiniteError
from fxquant.memory.bound import relax


def require_finite(tensor: Tensor, what: str) -> None:
    """Refuse NaN and infinity. Fake and meta tensors, which have no values, and integer tensors pass.

    Args:
        tensor: Any shape and dtype.
        what: Name of the tensor in the message, such as ``"the weight of blocks.3.attn1.to_q"``.

    Raises:
        NonFiniteError: An element is NaN or infinite; the message counts both.
    """
    if is_fake(tensor) or tensor.is_meta or not tensor.is_floating_point() or tensor.numel() == 0:
        return
    # Any NaN or infinity shows in the extremes. Unlike isfinite(), they need no mask as large as the tensor.
    low, high = torch.aminmax(tensor.detach())
    relax()
    if math.isfinite(low.item()) and math.isfinite(high.item()):
        return
    nans = int(tensor.isnan().sum().item())
    infinities = int(tensor.isinf().sum().item())
    raise NonFiniteError(
        f"{what} holds {nans} NaN and {infinities} infinite values of {tensor.numel()}; these have no code."
    )


def within_float32(moments: Tensor) -> Tensor:
    """Second moments with the same ratios, neither too large nor too small for arithmetic in float32.

    Rounding depends only on the ratios. If the largest moment is above 2^60 or below 2^-60, all are divided by a power
    of two: the model's activations may be finite although their squares are not finite in float32, or are 0 there.
    """
    largest = float(moments.diagonal().max()) if len(moments) else 0.0
    return moments if 2.0**-60 <= largest <= 2.0**60 else divided(moments, largest)


def divided(values: Tensor, largest: float) -> Tensor:
    """Values divided by the power of two that brings ``largest`` into 1 to 2; as they are if it is 0 or not finite."""
    return values / 2.0 ** (math.frexp(largest)[1] - 1) if 0.0 < largest < math.inf else values
