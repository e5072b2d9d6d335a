"""A tiny FLUX pipeline without text encoders."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import Tensor

from tests.zoo.models import ENTRIES

ENTRY = next(entry for entry in ENTRIES if entry.id == "Flux2D")
MODEL = ENTRY.model()


def make_pipe(transformer: Any) -> FluxPipeline:
    """A pipeline around a transformer."""
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, latent_channels=1).eval()
    parts = dict.fromkeys(["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
    pipe = FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, transformer=transformer, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _prompt() -> dict[str, Any]:
    generator, config = torch.Generator().manual_seed(0), MODEL.config
    return {
        "prompt_embeds": torch.randn(1, 5, config.joint_attention_dim, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, config.pooled_projection_dim, generator=generator),
        "height": 8,
        "width": 8,
        "num_inference_steps": 2,
        "output_type": "latent",
    }


PROMPT = _prompt()
"""Arguments of a call of the pipeline."""


def images(pipe: FluxPipeline, **options: Any) -> Tensor:
    """Latents of the same image each time."""
    made: Tensor = pipe(**PROMPT, generator=torch.Generator().manual_seed(1), **options).images
    return made
