"""A DiT that compiles in a second, and calls of it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import Tensor, nn

from fxquant.testing import STEPS, tiny_dit

__all__ = ["STEPS", "calibrate", "inputs", "make_dit", "make_pipeline", "run"]


def make_dit(layers: int = 1, **options: Any) -> DiTTransformer2DModel:
    """A DiT for 8 x 8 latents of 4 channels. Its adaLN layers have nonzero weights, unlike after initialization."""
    model = tiny_dit(layers, **options)
    assert isinstance(model, DiTTransformer2DModel)
    return model


def make_pipeline(model: nn.Module | None = None) -> DiTPipeline:
    """A pipeline around the model, or around a new DiT; its images have 8 x 8 pixels."""
    torch.manual_seed(1)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, latent_channels=4).eval()
    pipe = DiTPipeline(make_dit() if model is None else model, vae, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs(batch: int = 4, timestep: float | None = 500.0, size: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """Keyword arguments of a call; without `timestep`, each sample has its own random timestep."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(0, 1000, (batch,), generator=generator)
    return {
        "hidden_states": torch.randn(batch, 4, size, size, generator=generator),
        "timestep": steps if timestep is None else torch.full((batch,), int(timestep)),
        "class_labels": torch.randint(0, 10, (batch,), generator=generator),
    }


@torch.no_grad()
def run(model: nn.Module, **options: Any) -> Tensor:
    """Output of one call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sample: Tensor = model(**inputs(**options)).sample
    return sample


def calibrate(model: nn.Module, steps: Sequence[float] = STEPS, **options: Any) -> Any:
    """A calibration function with one call per step."""

    def calibration() -> None:
        for seed, step in enumerate(steps):
            run(model, timestep=step, seed=seed, **options)

    return calibration
