"""Tiny VAEs with random weights, and what they make of latents."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor


def make_vae(**options: Any) -> AutoencoderKL:
    """A VAE with attention in the middle, whose latents have as many pixels as its images."""
    torch.manual_seed(0)
    return AutoencoderKL(
        **{"block_out_channels": (8,), "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 8, **options}
    ).eval()


def latents(batch: int = 1, size: int = 8, seed: int = 0) -> Tensor:
    """Latents of images."""
    return torch.randn(batch, 4, size, size, generator=torch.Generator().manual_seed(seed))


def images(size: int = 8, seed: int = 0) -> Tensor:
    """An image of noise."""
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@torch.no_grad()
def decoded(vae: Any, **options: Any) -> Tensor:
    """What a VAE makes of latents."""
    held: Tensor = vae.decode(latents(**options).to(vae.dtype)).sample
    return held


@torch.no_grad()
def encoded(vae: Any, **options: Any) -> Tensor:
    """The means of the latents that a VAE makes of an image."""
    held: Tensor = vae.encode(images(**options).to(vae.dtype)).latent_dist.mean
    return held


def psnr(image: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB; the peak is the range of the reference."""
    peak = reference.max() - reference.min()
    return float(20 * torch.log10(peak) - 10 * torch.log10((image - reference).square().mean()))
