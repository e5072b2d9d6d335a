"""Small modules that the tests of passes rewrite."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.plan import ActivationRange, LayerPlan, Plan


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
