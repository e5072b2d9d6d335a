"""What a number format is: how values become codes, what their scales are, and how both are stored."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxquant.numerics.formats.conduct import guard
from fxquant.registry import OWN


@dataclass(frozen=True, eq=False)
class Scales:
    """The scales of codes, as they are stored.

    Attributes:
        scale: One scale for each part of the values that shares one: float32, or for formats with 8-bit scales uint8,
            the bytes of a ``float8_e8m0fnu`` or ``float8_e4m3fn``.
        zero_point: The code of 0, uint8, of the shape of ``scale``; None for formats without zero points.
        global_scale: float32, the scale of the scales; None for formats without one.
    """

    scale: Tensor
    zero_point: Tensor | None = None
    global_scale: Tensor | None = None


class Format(abc.ABC):
    """A number format, such as ``int4``, ``fp8`` or ``mxfp4``.

    A code has ``bits`` bits and is a uint8 number. Codes are stored densely (:mod:`fxquant.numerics.packing`); the
    codes of activations take one byte each. What a code stands for depends on its scales. Several values share a
    scale. Formats with a ``block`` fix how many channels do; for the others the plan decides it: a tensor, a channel, a
    group of channels, a square block of a weight, or a token.

    Other packages add formats through the entry points ``fxquant.formats``. All methods also take fake and meta
    tensors, because plans are replayed on models without weights, and none branches on values. Arithmetic is in
    float32, or in float64 for float64 values.

    Attributes:
        name: Its name in texts, files and graphs.
        bits: Bits per code, 2 to 8.
        block: Channels that share a scale; 0 if the plan decides it.
        zero_points: Whether codes have a zero point beside their scale; not with blocks or scales of 8 bits.
        global_scales: Whether the scales have a float32 scale of their own; only with blocks.
        scale_dtype: Dtype of the stored scales: float32, or uint8 for scales of 8 bits.
        weights_only: Whether only weights can have this format.
    """

    name: str
    bits: int
    block: int = 0
    zero_points: bool = False
    global_scales: bool = False
    scale_dtype: torch.dtype = torch.float32
    weights_only: bool = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if not cls.__module__.startswith(OWN):
            guard(cls)

    @abc.abstractmethod
    def values(self) -> Tensor:
        """The exact grid: what each code stands for at scale 1, float32 ``[2**bits]``; NaN or infinity if no number.

        For formats with zero points, at the zero point 0.
        """

    def scale_values(self, scale: Tensor) -> Tensor:
        """What stored scales stand for, float32; formats with scales of 8 bits override this."""
        return scale

    def global_scale(self, low: Tensor, high: Tensor) -> Tensor | None:
        """The scale of the scales for values of these ranges, float32 of the shape of ``low``; None without one."""
        return None

    @abc.abstractmethod
    def scales(
        self, low: Tensor, high: Tensor, *, symmetric: bool = False, global_scale: Tensor | None = None
    ) -> Scales:
        """The scales that cover ranges.

        Args:
            low: Lowest values, any float dtype and shape.
            high: Highest values, of the same shape.
            symmetric: Fix zero points at the middle code. Formats without zero points are always symmetric.
            global_scale: The scale of the scales, which broadcasts against ``low``, for formats that have one.

        Returns:
            The scales, of the shape of ``low``.
        """

    @abc.abstractmethod
    def encode(self, x: Tensor, scales: Scales) -> Tensor:
        """The codes of the nearest values of the grid, uint8 of the shape of ``x``. Values beyond the grid saturate.

        Args:
            x: Values, any float dtype.
            scales: Scales that broadcast against ``x``.
        """

    @abc.abstractmethod
    def decode(self, codes: Tensor, scales: Scales, dtype: torch.dtype) -> Tensor:
        """What codes stand for.

        Args:
            codes: uint8, any shape.
            scales: Scales that broadcast against ``codes``.
            dtype: Dtype of the result, computed in float32, or in float64 for float64.
        """

    def round(self, x: Tensor, scales: Scales) -> Tensor:
        """Encode and decode: the values of ``x`` on the grid, of its shape and dtype."""
        return self.decode(self.encode(x, scales), scales, x.dtype)

    @property
    def plain_scales(self) -> bool:
        """Whether a value can have one float32 scale: convolutions and the products of attention need such formats."""
        return not (self.block or self.global_scales) and self.scale_dtype == torch.float32

    def __repr__(self) -> str:
        return f"<format {self.name}>"
