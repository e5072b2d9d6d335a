"""Small models for the tests of tensor parallelism."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

import fxquant
from fxquant.parallel.plan import TensorParallelPlan
from fxquant.pipeline.recipes import make_recipe


class Blocks(nn.Module):
    """Attention with rotary embeddings, a gated feed-forward and side by side layers, over 24 channels."""

    def __init__(self, heads: int = 2, hidden: int = 32, times: int = 1, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.heads, self.times = heads, times
        self.qkv, self.out = nn.Linear(24, 72), nn.Linear(24, 24)
        self.up, self.down = nn.Linear(24, 2 * hidden), nn.Linear(hidden, 24)
        self.side, self.joined = nn.Linear(24, 16), nn.Linear(40, 24)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = functional.layer_norm(x, [24])
        for _ in range(self.times):
            x = x + self.out(self.attend(x)) * timestep[:, None, None]
        hidden, gate = self.up(functional.layer_norm(x, [24])).chunk(2, -1)
        x = functional.layer_norm(x + self.down(hidden * functional.gelu(gate)), [24])
        return x + self.joined(torch.cat([x, functional.gelu(self.side(x))], -1))


class Odd(nn.Module):
    """One linear of five channels."""

    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.only(x) * timestep[:, None, None]


def quantized(model: nn.Module, recipe: str = "dynamic-w8a8", width: int = 24) -> Any:
    """A model of this file, quantized."""
    x = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(0))

    def calibrate() -> None:
        model(x=x, timestep=torch.tensor([0.5, 0.25]))

    every = make_recipe(recipe, layers="all")
    return fxquant.compile(model.eval(), recipe=every, calibrate=calibrate, backend="fake-quant")


def kinds(plan: TensorParallelPlan) -> dict[str, str]:
    """The style of each layer as a text."""
    return {name: f"{layer.style}{', gathered' if layer.gathered else ''}" for name, layer in plan.layers.items()}
