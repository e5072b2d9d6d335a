"""A model outside of diffusers that takes a moment to trace, and calls of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

WIDTH, TOKENS = 16, 8


class Block(nn.Module):
    """A residual feed-forward block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.first, self.second = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.second(nn.functional.silu(self.first(self.norm(h))))


class Small(nn.Module):
    """Two blocks; if tied, they share a weight; one may have a linear that no call runs."""

    def __init__(self, tied: bool = False, spare: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp, self.out = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4)
        self.register_buffer("positions", torch.randn(TOKENS, WIDTH))
        self.blocks = nn.ModuleList([Block(), Block()])
        if tied:
            self.blocks[1].first.weight = self.blocks[0].first.weight  # type: ignore[union-attr,assignment]
        self.spare = nn.Linear(WIDTH, WIDTH) if spare else None
        self.eval()

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        positions = torch.zeros(2, TOKENS, WIDTH, dtype=x.dtype)
        positions[:, 1:].copy_(self.positions[1:])
        time = (timestep[:, None, None] / 1000).to(x.dtype)
        h = self.inp(x.squeeze(1)) + positions[:1] + time  # torch squeezes no dimension of 8.
        for block in self.blocks:
            h = block(h)
        out: Tensor = self.out(h)
        return out


def small_call(batch: int = 2, seed: int = 0, step: float = 500.0) -> dict[str, Any]:
    """Arguments of a call."""
    x = torch.randn(batch, TOKENS, 4, generator=torch.Generator().manual_seed(seed))
    return {"x": x, "timestep": torch.full((batch,), step)}
