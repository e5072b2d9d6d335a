"""The model and the calls of all tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxquant.testing import Lifecycle, check_lifecycle, example_call, example_calls, tiny_dit, tiny_linears


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


@pytest.fixture
def lifecycle() -> Callable[..., Lifecycle]:
    """Runs a recipe through the life of a small DiT, with a call of other latents; the last step is each backend."""
    model = tiny_dit()

    def check(recipe: str, backends: Sequence[str] = ("fake-quant", "native")) -> Lifecycle:
        recipe = f"remove-no-ops,{recipe}"
        return check_lifecycle(
            recipe, model, example_calls(model), other_shape=example_call(model, size=4), backends=backends
        )

    return check
