"""Floats with one float32 scale for a tensor, channel, group, block of a weight, or token: fp8 and nf4."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.numerics.formats.elements import Element, Levels, TorchElement
from fxquant.numerics.formats.format import Format, Scales
from fxquant.numerics.grids import compute_dtype


def largest_magnitude(low: Tensor, high: Tensor) -> Tensor:
    """The largest absolute value of ranges, of their shape and dtype. NaN if an end is NaN."""
    return torch.maximum(-low, high).clamp(min=0.0)


class ScaledFloat(Format):
    """A code q stands for ``scale * element(q)``, and the largest value of a range is the largest element.

    A range of exactly 0 gets scale 1. A range that is too narrow for a normal float32 scale gets the smallest normal
    float32 scale. Infinity saturates. NaN keeps a code of its own in 8-bit floats.

    Args:
        name: Name of the format.
        element: Its grid at scale 1.
        weights_only: Whether only weights can have it.
    """

    def __init__(self, name: str, element: Element, weights_only: bool = False) -> None:
        self.name, self.bits, self.element = name, element.bits, element
        self.weights_only = weights_only

    def values(self) -> Tensor:
        return self.element.decode(torch.arange(2**self.bits, dtype=torch.uint8), torch.float32)

    def scales(
        self, low: Tensor, high: Tensor, *, symmetric: bool = False, global_scale: Tensor | None = None
    ) -> Scales:
        step = largest_magnitude(low.to(torch.float64), high.to(torch.float64)) / self.element.largest
        limits = torch.finfo(torch.float32)
        return Scales(torch.where(step == 0.0, 1.0, step.clamp(limits.tiny, limits.max)).to(torch.float32))

    def encode(self, x: Tensor, scales: Scales) -> Tensor:
        dtype = compute_dtype(x.dtype)
        return self.element.encode(x.to(dtype) / scales.scale.to(dtype))

    def decode(self, codes: Tensor, scales: Scales, dtype: torch.dtype) -> Tensor:
        inner = compute_dtype(dtype)
        return (self.element.decode(codes, inner) * scales.scale.to(inner)).to(dtype)


_NORMAL = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
"""Quantiles of the normal distribution (T. Dettmers et al., "QLoRA", arXiv 2305.14314, appendix E)."""

FP8 = ScaledFloat("fp8", TorchElement(torch.float8_e4m3fn))
FP8E5M2 = ScaledFloat("fp8e5m2", TorchElement(torch.float8_e5m2))
NF4 = ScaledFloat("nf4", Levels(_NORMAL), weights_only=True)
