"""Block formats: floats of 4 to 8 bits whose scales have 8 bits and serve 16 or 32 neighbouring channels.

Scales are stored as the bytes (uint8) of torch's ``float8_e8m0fnu`` and ``float8_e4m3fn``; ``tensor.view(dtype)`` gives
them the dtype.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxquant.numerics.formats.elements import Element, SmallFloat, TorchElement
from fxquant.numerics.formats.floats import largest_magnitude
from fxquant.numerics.formats.format import Format, Scales
from fxquant.numerics.grids import compute_dtype

_NAN = 255
_FLOAT32_MANTISSA = 23
_LEAST_GLOBAL = 2.0**-120
"""With a smaller scale of scales, its reciprocal over the smallest scale of a block, 2**-6, would be infinite."""


class MX(Format):
    """Microscaling formats of the Open Compute Project (OCP MX specification 1.0): 32 values share a power of two.

    The scale is ``2**(floor(log2(m)) - e)`` for the largest magnitude m of the block, where ``2**e`` is the largest
    power of two of the element. Values above the largest element, up to twice ``2**e``, saturate. Scales are 2**-127 to
    2**127 (e8m0); smaller blocks get 2**-127. A block that holds NaN gets the scale NaN: all its values are NaN.
    Infinity saturates.

    Args:
        name: Name of the format.
        element: Its grid at scale 1.
    """

    block = 32
    scale_dtype = torch.uint8

    def __init__(self, name: str, element: Element) -> None:
        self.name, self.bits, self.element = name, element.bits, element
        self.exponent = math.floor(math.log2(element.largest))

    def values(self) -> Tensor:
        return self.element.decode(torch.arange(2**self.bits, dtype=torch.uint8), torch.float32)

    def scales(
        self, low: Tensor, high: Tensor, *, symmetric: bool = False, global_scale: Tensor | None = None
    ) -> Scales:
        largest = largest_magnitude(low, high).to(torch.float32)
        biased = (largest.view(torch.int32) >> _FLOAT32_MANTISSA) & 255
        return Scales(torch.where(largest.isnan(), _NAN, (biased - self.exponent).clamp(min=0)).to(torch.uint8))

    def scale_values(self, scale: Tensor) -> Tensor:
        return scale.view(torch.float8_e8m0fnu).to(torch.float32)

    def encode(self, x: Tensor, scales: Scales) -> Tensor:
        dtype = compute_dtype(x.dtype)
        return self.element.encode(x.to(dtype) / self.scale_values(scales.scale).to(dtype))

    def decode(self, codes: Tensor, scales: Scales, dtype: torch.dtype) -> Tensor:
        inner = compute_dtype(dtype)
        return (self.element.decode(codes, inner) * self.scale_values(scales.scale).to(inner)).to(dtype)


class NVFP4(Format):
    """NVIDIA's 4-bit format: 16 values of e2m1 share a scale in e4m3, and a float32 scale serves all of these scales.

    A value is ``global_scale * scale * element(q)``. The global scale brings the largest magnitude of the tensor (of a
    token, if ranges are dynamic) to 448 * 6, the largest scale times the largest element. Scales are 2**-6 to 448:
    blocks more than 28,672 times smaller than the largest value get 2**-6, and their small values round to 0. Values
    and infinity beyond the calibrated range saturate. A block that holds NaN gets the scale NaN.
    """

    name = "nvfp4"
    bits = 4
    block = 16
    global_scales = True
    scale_dtype = torch.uint8
    element = SmallFloat(2, 1)

    def values(self) -> Tensor:
        return self.element.decode(torch.arange(2**self.bits, dtype=torch.uint8), torch.float32)

    def scale_values(self, scale: Tensor) -> Tensor:
        return scale.view(torch.float8_e4m3fn).to(torch.float32)

    def global_scale(self, low: Tensor, high: Tensor) -> Tensor:
        limits = torch.finfo(torch.float32)
        top = torch.finfo(torch.float8_e4m3fn).max * self.element.largest
        step = largest_magnitude(low.to(torch.float64), high.to(torch.float64)) / top
        return torch.where(step == 0.0, 1.0, step.clamp(_LEAST_GLOBAL, limits.max)).to(torch.float32)

    def scales(
        self, low: Tensor, high: Tensor, *, symmetric: bool = False, global_scale: Tensor | None = None
    ) -> Scales:
        assert global_scale is not None
        limits = torch.finfo(torch.float8_e4m3fn)
        steps = largest_magnitude(low, high).to(torch.float32) / self.element.largest / global_scale
        scale = steps.clamp(limits.tiny, limits.max).to(torch.float8_e4m3fn).view(torch.uint8)
        return Scales(scale, None, global_scale)

    def encode(self, x: Tensor, scales: Scales) -> Tensor:
        assert scales.global_scale is not None
        dtype = compute_dtype(x.dtype)
        scale = self.scale_values(scales.scale).to(dtype)
        # By the reciprocal, as the kernels of GPUs do it.
        return self.element.encode(x.to(dtype) * (scales.global_scale.to(dtype).reciprocal() / scale))

    def decode(self, codes: Tensor, scales: Scales, dtype: torch.dtype) -> Tensor:
        assert scales.global_scale is not None
        inner = compute_dtype(dtype)
        scale = self.scale_values(scales.scale).to(inner) * scales.global_scale.to(inner)
        return (self.element.decode(codes, inner) * scale).to(dtype)


MXFP8 = MX("mxfp8", TorchElement(torch.float8_e4m3fn))
MXFP6 = MX("mxfp6", SmallFloat(2, 3))
MXFP6E3M2 = MX("mxfp6e3m2", SmallFloat(3, 2))
MXFP4 = MX("mxfp4", SmallFloat(2, 1))
NVFP4_FORMAT = NVFP4()
