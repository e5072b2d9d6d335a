"""Learned rounding: soft during learning, hard at the end.

M. Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization" (AdaRound, arXiv 2004.10568). Each
weight lies between two codes, ``floor(w / s)`` and the next one. The value h, 0 to 1, says how far the weight is
rounded up. It is a rectified sigmoid of a variable v. A regularizer drives h to 0 or 1 as its exponent falls.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxquant.errors import ConfigurationError
from fxquant.numerics.formats import Scales, top_of
from fxquant.numerics.weights import QuantizedWeight

LOWEST, HIGHEST = -0.1, 1.1
"""The range to which the sigmoid is stretched, so that h reaches 0 and 1 (gamma and zeta in the paper)."""


@dataclass(frozen=True)
class Hardening:
    """The schedule of the regularizer.

    Attributes:
        iterations: Total number of steps.
        weight: Weight of the regularizer after the warm-up.
        warm_up: Share of the steps before the regularizer starts.
        first: Exponent at the start of the regularizer.
        last: Exponent at the end.
    """

    iterations: int
    weight: float
    warm_up: float = 0.2
    first: float = 20.0
    last: float = 2.0

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ConfigurationError(f"a rounding cannot be learned in {self.iterations} iterations; use at least 1")
        if self.weight <= 0 or not 0 <= self.warm_up < 1:
            raise ConfigurationError(
                f"a regularizer of weight {self.weight} after a warm-up of {self.warm_up} leaves weights between "
                "codes; use a weight above 0 and a warm-up from 0 to below 1"
            )

    def exponent(self, iteration: int) -> float | None:
        """The exponent at an iteration, counted from 0; None before the regularizer starts."""
        done = iteration / self.iterations
        if done < self.warm_up:
            return None
        left = 1 - (done - self.warm_up) / (1 - self.warm_up)
        return self.last + (self.first - self.last) * left


class SoftWeight(nn.Module):
    """A weight on its grid, each element somewhere between its two codes.

    Args:
        weight: ``[out, in]``, any float dtype, finite.
        scales: Scales and zero points of the grid, ``[out, groups]``.
        format: Name of the integer format.
        group_size: Input channels that share a grid; 0 for all of them.
    """

    def __init__(self, weight: Tensor, scales: Scales, format: str, group_size: int) -> None:
        super().__init__()
        assert scales.zero_point is not None
        self.format, self.group_size, self.top = format, group_size, top_of(format)
        self.scale, self.zero_point = scales.scale, scales.zero_point
        steps = self._grouped(weight.detach().to(torch.float32)) / self.scale[..., None]
        self._below = steps.floor()
        rest = (steps - self._below - LOWEST) / (HIGHEST - LOWEST)
        self._below += self.zero_point[..., None]
        self.v = nn.Parameter(torch.logit(rest.clamp_(1e-4, 1 - 1e-4)))

    def up(self) -> Tensor:
        """How far each element is rounded up: h, ``[out, groups, in / groups]``, 0 to 1."""
        return (torch.sigmoid(self.v) * (HIGHEST - LOWEST) + LOWEST).clamp(0.0, 1.0)

    def forward(self) -> Tensor:
        """The current soft weight, float32 ``[out, in]``."""
        return self._value(self._below + self.up())

    def undecided(self, exponent: float) -> Tensor:
        """The regularizer: sum over elements of ``1 - |2 h - 1| ** exponent``."""
        return (1 - (2 * self.up() - 1).abs().pow(exponent)).sum()

    @torch.no_grad()
    def nearest(self) -> Tensor:
        """The weight rounded to nearest, float32 ``[out, in]``, before learning starts."""
        return self._value(self._below + (self.up() >= 0.5))

    @torch.no_grad()
    def hard(self) -> QuantizedWeight:
        """The codes, each the one that h is closer to."""
        codes = (self._below + (self.up() >= 0.5)).clamp_(0, self.top).to(torch.uint8).flatten(1)
        return QuantizedWeight.from_codes(
            codes, Scales(self.scale, self.zero_point), format=self.format, group_size=self.group_size
        )

    def _value(self, codes: Tensor) -> Tensor:
        return ((codes.clamp(0, self.top) - self.zero_point[..., None]) * self.scale[..., None]).flatten(1)

    def _grouped(self, weight: Tensor) -> Tensor:
        return weight.unflatten(1, (self.scale.shape[1], -1))
