"""The model and the calls of all tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxquant.testing import example_call, tiny_linears


@pytest.fixture
def toy() -> nn.Module:
    """Two linears."""
    return tiny_linears()


@pytest.fixture
def calls() -> list[dict[str, Tensor]]:
    """Calls of the model at three timesteps. Golden texts hold scales and noise that follow from these numbers."""
    torch.manual_seed(1)
    return [{"x": torch.randn(2, 5, 16), "timestep": torch.full((2,), step)} for step in (0.9, 0.5, 0.1)]


@pytest.fixture
def longer(toy: nn.Module) -> dict[str, Any]:
    """A call with more tokens, for which another graph is made."""
    return example_call(toy, size=7)
