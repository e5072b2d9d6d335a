"""A DiT pipeline whose images have 16 x 16 pixels, in float and quantized, and a feature extractor for them."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
from torch import Tensor, nn

import fxquant
from tests.tiny import calibrate, make_dit


def make_pipe(seed: int = 1) -> DiTPipeline:
    """The float pipeline."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        layers_per_block=1,
        latent_channels=4,
    )
    pipe = DiTPipeline(make_dit(), vae.eval(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def quantized_pipe(recipe: str = "rtn-w4a8") -> DiTPipeline:
    """The same pipeline, quantized."""
    pipe: Any = make_pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.transformer = fxquant.compile(pipe.transformer, recipe=recipe, calibrate=calibrate(pipe.transformer))
    return pipe


class Pooled(nn.Module):
    """Six features, eight spatial features and six class scores of images in [0, 1]."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        pooled = nn.functional.adaptive_avg_pool2d(images, (1, 2)).flatten(1)
        return {"features": pooled, "spatial": images[:, 0, :2, :4].flatten(1), "logits": 20 * pooled}


def pooled() -> Pooled:
    """The extractor, as ``--features tests.evaluation.pipes:pooled`` names it."""
    return Pooled()
