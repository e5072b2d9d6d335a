"""Number formats of unusual kinds, as other packages may add them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fxquant.authoring import Format, Scales, register_format
from fxquant.numerics.formats import FORMATS
from fxquant.numerics.grids import compute_dtype


class BytesOfScales(Format):
    """4-bit integers about 0 whose scale is a power of two, stored as a byte, without blocks."""

    name, bits, scale_dtype = "byte4", 4, torch.uint8

    def values(self) -> Tensor:
        return torch.arange(16.0) - 8

    def scale_values(self, scale: Tensor) -> Tensor:
        return torch.exp2(scale.to(torch.float32) - 127)

    def scales(
        self, low: Tensor, high: Tensor, *, symmetric: bool = False, global_scale: Tensor | None = None
    ) -> Scales:
        largest = torch.maximum(-low, high).clamp(min=1e-30).to(torch.float32)
        return Scales(((largest / 7).log2().ceil() + 127).clamp(0, 254).to(torch.uint8))

    def encode(self, x: Tensor, scales: Scales) -> Tensor:
        step = self.scale_values(scales.scale).to(compute_dtype(x.dtype))
        return ((x.to(step.dtype) / step).round().clamp(-8, 7) + 8).to(torch.uint8)

    def decode(self, codes: Tensor, scales: Scales, dtype: torch.dtype) -> Tensor:
        inner = compute_dtype(dtype)
        return ((codes.to(inner) - 8) * self.scale_values(scales.scale).to(inner)).to(dtype)


class Doubled(Format):
    """6-bit numbers with a zero point whose range is twice as wide as that of integers would be."""

    name, bits, zero_points = "wide6", 6, True

    def values(self) -> Tensor:
        return torch.arange(64.0)

    def scales(
        self, low: Tensor, high: Tensor, *, symmetric: bool = False, global_scale: Tensor | None = None
    ) -> Scales:
        step = ((high.clamp(min=0) - low.clamp(max=0)).to(torch.float32) * 2 / 63).clamp(min=1e-30)
        return Scales(step, torch.full_like(step, 32).to(torch.uint8))

    def encode(self, x: Tensor, scales: Scales) -> Tensor:
        assert scales.zero_point is not None
        inner = compute_dtype(x.dtype)
        codes = (x.to(inner) / scales.scale.to(inner)).round() + scales.zero_point.to(inner)
        return codes.clamp(0, 63).to(torch.uint8)

    def decode(self, codes: Tensor, scales: Scales, dtype: torch.dtype) -> Tensor:
        assert scales.zero_point is not None
        inner = compute_dtype(dtype)
        return ((codes.to(inner) - scales.zero_point.to(inner)) * scales.scale.to(inner)).to(dtype)


@contextmanager
def registered(*formats: Format) -> Iterator[None]:
    """Registers formats for the time of a test."""
    for format in formats:
        register_format(format.name)(format)
    try:
        yield
    finally:
        for format in formats:
            FORMATS.remove(format.name)
