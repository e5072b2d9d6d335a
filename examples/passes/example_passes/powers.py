"""A number format of another package: 4-bit powers of two, with which a product needs no multiplication."""

from __future__ import annotations

import torch
from torch import Tensor

from fxquant.authoring import Format, Scales, register_format


class PowersOfTwo(Format):
    """0 and the powers of two from 2**-6 to 1, with a sign: ``scale * (+-)2**(k - 7)`` for the code ``k``, 0 for 0.

    (D. Miyashita et al., "Convolutional Neural Networks using Logarithmic Data Representation", arXiv 1603.01025.)
    """

    name = "pow4"
    bits = 4

    def values(self) -> Tensor:
        positive = torch.cat([torch.zeros(1), torch.exp2(torch.arange(-6.0, 1.0))])
        return torch.cat([positive, -positive])

    def scales(
        self, low: Tensor, high: Tensor, *, symmetric: bool = False, global_scale: Tensor | None = None
    ) -> Scales:
        largest = torch.maximum(-low, high).to(torch.float32)
        return Scales(torch.where(largest > 0, largest, 1.0))

    def encode(self, x: Tensor, scales: Scales) -> Tensor:
        share = x.abs() / scales.scale
        exponent = torch.where(share < 2.0**-7, 0.0, (share.clamp(2.0**-6, 1.0).log2() + 7).round())
        return exponent.to(torch.uint8) | (torch.signbit(x).to(torch.uint8) << 3)

    def decode(self, codes: Tensor, scales: Scales, dtype: torch.dtype) -> Tensor:
        exponent = (codes & 7).to(torch.float32)
        magnitude = torch.where(exponent > 0, torch.exp2(exponent - 7), 0.0) * scales.scale
        return torch.where(codes > 7, -magnitude, magnitude).to(dtype)


POW4 = register_format("pow4")(PowersOfTwo())
