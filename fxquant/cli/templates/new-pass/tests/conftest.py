"""A model of two linears, small enough to read its graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn


class Toy(nn.Module):
    """``y = second(gelu(first(x))) + timestep``, 16 channels."""

    def __init__(self) -> None:
        """Random weights, the same each time."""
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        """Tokens ``[batch, tokens, 16]`` and one timestep per sample, ``[batch]``."""
        return self.second(nn.functional.gelu(self.first(x))) + timestep[:, None, None]


@pytest.fixture
def toy() -> Toy:
    """The model."""
    return Toy().eval()


@pytest.fixture
def calls() -> list[dict[str, Tensor]]:
    """Calls of the model at three timesteps."""
    torch.manual_seed(1)
    return [{"x": torch.randn(2, 5, 16), "timestep": torch.full((2,), step)} for step in (0.9, 0.5, 0.1)]


@pytest.fixture
def longer(calls: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A call with more tokens, for which another graph is made."""
    return {**calls[0], "x": torch.randn(2, 7, 16)}
