"""Features for tests of metrics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="module")
def two_sets() -> tuple[Tensor, Tensor]:
    """Correlated float32 features [600, 24] and [500, 24] with large means, of two kinds of images."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(24, 24, generator=generator)
    first = torch.randn(600, 24, generator=generator) @ mix + 30
    second = torch.randn(500, 24, generator=generator) @ (mix + 0.2 * torch.randn(24, 24, generator=generator)) + 30.5
    return first, second
