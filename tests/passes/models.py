"""Small modules that the tests of passes rewrite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.planning.context import PassContext
from fxquant.planning.decisions import ActivationRange, LayerPlan
from fxquant.planning.plan import Plan
from fxquant.statistics.collection import Statistics


class Patches(nn.Module):
    """A convolution, then two linears that read one value."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 4, 2, stride=2)
        self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x).flatten(2).transpose(1, 2)
        return self.q(y), self.k(y)


class AdaLN(nn.Module):
    """A linear behind an adaptive layer norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.time, self.q = nn.Linear(4, 8), nn.Linear(4, 4)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        scale, shift = self.time(F.silu(timestep)).unsqueeze(1).chunk(2, -1)
        return self.q(F.layer_norm(x, (4,)) * (1 + scale) + shift)


def patches() -> dict[str, Tensor]:
    return {"x": torch.randn(2, 2, 4, 4), "timestep": torch.zeros(2)}


def adaln() -> dict[str, Tensor]:
    return {"x": torch.randn(2, 3, 4), "timestep": torch.randn(2, 4)}


def planned(**layers: tuple[str, list[int], int | None, int | None, int]) -> Plan:
    """A plan of ``name=(kind, shape, weight bits, activation bits, group size)``, ranges given."""
    plan = Plan("", "", "timestep")
    for name, (kind, shape, weight, activation, group) in layers.items():
        given = None if activation is None else ActivationRange(-1.0, 3.0, "minmax")
        plan.layers[name] = LayerPlan(kind, "block", shape, weight, activation, group, activation=given)
    return plan


class Timed(nn.Module):
    """An adaptive layer norm whose result two linears read, and a linear behind one of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.time, self.q, self.k = nn.Linear(4, 8), nn.Linear(4, 4), nn.Linear(4, 2, bias=False)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = self.time(F.silu(text + timestep[:, None] / 1000)).unsqueeze(1).chunk(2, -1)
        y = F.layer_norm(x, (4,)) * (1 + scale) + shift
        return self.out(self.q(y)), self.k(y)


def timed(batch: int = 2) -> dict[str, Tensor]:
    return {"x": torch.randn(batch, 3, 4), "timestep": torch.full((batch,), 500), "text": torch.randn(batch, 4)}


TIMED = {
    "time": ("linear", [8, 4], None, None, 0),
    "q": ("linear", [4, 4], 8, 8, 0),
    "k": ("linear", [2, 4], 8, 8, 0),
    "out": ("linear", [3, 4], 8, 8, 0),
}


def seen(context: PassContext, name: str, ranges: dict[float, Sequence[tuple[float, float]]]) -> PassContext:
    """Let calibration have seen a layer's input: at each timestep the extremes of each channel."""
    context.statistics = context.statistics or Statistics(num_rows=4)
    for step, channels in ranges.items():
        rows = torch.tensor(channels).T[None]
        context.statistics.record(name, rows, torch.tensor([step]), -1)
    return context


MIDDLES = {900.0: 8.0, 800.0: 7.0, 500.0: 0.0, 100.0: -4.0}
"""Timesteps, and the middle of the first channel of q's input there."""


def moving(**layers: tuple[str, list[int], int | None, int | None, int]) -> PassContext:
    """For :class:`Timed`; the input of q moves with time in two channels, that of out stands still."""
    context = PassContext(planned(**(TIMED | layers)))
    seen(context, "q", {t: [(m - 1, m + 1), (m / 2, m / 2 + 2), (-1, 1), (2, 4)] for t, m in MIDDLES.items()})
    seen(context, "out", {t: [(0, 2), (-1, 1), (-3, -1), (5, 5)] for t in MIDDLES})
    context.plan.layers["q"].observed = context.plan.layers["k"].observed = "q"
    return context
