"""Caches of steps on models whose pipelines add the residuals of a ControlNet between blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig
from torch import Tensor, nn

import fxquant
from tests.zoo.test_inputs_of_pipelines import FLUX, flux_controlnet, run

CONFIGS = [
    FirstBlockCacheConfig(threshold=1e9),
    MagCacheConfig(mag_ratios=[1.0] * 8, num_inference_steps=8, threshold=1.0, retention_ratio=0.1),
]


class Block(nn.Module):
    """Adds the same in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(torch.ones_like(x)).tanh()


class Controlled(nn.Module):
    """Blocks, between which residuals are added."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: Tensor, timestep: Tensor, prompt: Tensor, first: Tensor, second: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = block(x)
            x = x + (first if number < 2 else second.to(x.dtype))
        return x * timestep[:, None] / 1000 + prompt


@pytest.mark.parametrize("config", CONFIGS, ids=["first block", "magnitude"])
def test_residuals_are_those_of_the_step(config: Any) -> None:
    """The blocks add the same in each step, so a skipped step is right if its residuals are its own."""
    model = Controlled().eval()
    made = fxquant.trace(model)
    made.enable_cache(config)
    prompt = torch.randn(2, 8)
    for step in range(4):
        x, first, second = torch.randn(3, 2, 8)
        call = (x, torch.full((2,), 900.0 - step), prompt, first, second)
        torch.testing.assert_close(made(*call), model(*call), rtol=1e-5, atol=1e-5)
    assert made.cache_counts["skipped"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=["first block", "magnitude"])
def test_flux(config: Any) -> None:
    """A step that differs from the one before only in its residuals follows them, up to what they do in blocks."""
    made = fxquant.trace(FLUX.model())
    call = flux_controlnet(FLUX.call(seed=1))
    small = [value * 0.05 for value in call["controlnet_block_samples"]]
    calls = [call, call | {"controlnet_block_samples": small}]
    plain = [run(made, each) for each in calls]
    made.enable_cache(config)
    assert made._cache is not None and len(made._cache.parts(made.captured[0].module).between) > 0
    with made.cache_context("cond"):
        found = [run(made, each) for each in calls]
    assert made.cache_counts == {"calls": 2, "skipped": 1}
    assert torch.equal(found[0], plain[0])
    assert (found[1] - plain[1]).norm() < 0.6 * (plain[0] - plain[1]).norm()
