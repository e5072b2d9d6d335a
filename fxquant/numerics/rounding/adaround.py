"""AdaRound layer by layer, based on the second moments of the inputs seen in calibration.

M. Nagel et al. (arXiv 2004.10568) minimize the error of a layer's output over samples of its input. That error is
``tr((W - Q) H (W - Q)^T)`` with H = E[x x^T]. So the moments that GPTQ needs are sufficient here too, and no sample is
kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.errors import ConfigurationError, NonFiniteError
from fxquant.numerics.finite import within_float32
from fxquant.numerics.ranges import RangeMethod
from fxquant.numerics.rounding.soft import Hardening, SoftWeight
from fxquant.numerics.weights import QuantizedWeight, weight_scales

HARDENING = Hardening(iterations=500, weight=10.0)
"""The error is divided by the mean error per weight of rounding to nearest, so one regularizer serves all layers."""

_RATE = 0.03


def adaround(
    weight: Tensor,
    moments: Tensor,
    *,
    format: str,
    group_size: int = 0,
    symmetric: bool = False,
    method: RangeMethod = "minmax",
    hardening: Hardening = HARDENING,
) -> QuantizedWeight:
    """Learn whether each weight is rounded up or down, so that the error of the layer's output is small.

    Args:
        weight: ``[out, in]``, any float dtype, finite.
        moments: ``E[x x^T]`` of the inputs, ``[in, in]`` of any float dtype.
        format: Name of an integer format. Learned rounding chooses between two neighbouring integers.
        group_size: Input channels that share a grid; 0 for all of them.
        symmetric: Fix zero points at ``2**(bits - 1)``.
        method: How the ranges are chosen, weighted by the mean squares of the inputs; see
            :func:`fxquant.numerics.ranges.weight_range`.
        hardening: Number of steps, and the schedule of the regularizer that makes them end at codes.

    Returns:
        The learned codes, or those of rounding to nearest if the learned ones do not have a lower error.

    Raises:
        ConfigurationError: As :func:`fxquant.numerics.weights.quantize_weight`, or if the number of inputs differs from
            the number of columns.
        NonFiniteError: The moments hold NaN or infinity.
    """
    if moments.shape != (weight.shape[1], weight.shape[1]):
        raise ConfigurationError(
            f"a weight of {weight.shape[1]} input channels was given moments of shape {tuple(moments.shape)}."
        )
    if not torch.isfinite(moments).all():
        raise NonFiniteError("the second moments of a layer's input hold NaN or infinity")
    exact, together = weight.detach().to(torch.float32), within_float32(moments).to(weight.device, torch.float32)
    scales = weight_scales(
        exact,
        format=format,
        group_size=group_size,
        symmetric=symmetric,
        method=method,
        importance=None if method == "minmax" else together.diagonal(),
    )

    def error(rounded: Tensor) -> Tensor:
        difference = exact - rounded
        return ((difference @ together) * difference).sum()

    with torch.inference_mode(False), torch.enable_grad():
        soft = SoftWeight(exact, scales, format, group_size)
        at_first = error(soft.nearest())
        start = soft.hard()
        if not at_first > 0:
            return start
        optimizer = torch.optim.Adam(soft.parameters(), lr=_RATE)
        for iteration in range(hardening.iterations):
            loss = error(soft()) * (exact.numel() / at_first)
            if (exponent := hardening.exponent(iteration)) is not None:
                loss = loss + hardening.weight * soft.undecided(exponent)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        learned = soft.hard()
        return learned if error(learned.dequantize(torch.float32)) < at_first else start
