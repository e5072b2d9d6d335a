"""Tiny pipelines with random weights, without text encoders, and the arguments of a call of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from tests.tiny import make_dit, make_pipeline

__all__ = ["cogvideox", "dit", "flux", "pixart", "sd3", "wan"]

Life = tuple[Any, dict[str, Any]]
"""A pipeline, and the arguments of a call of it."""


def _embeddings(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _finished(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _seeded(make: Callable[..., nn.Module], seed: int = 0, **config: Any) -> Any:
    torch.manual_seed(seed)
    return make(**config).eval()


def _vae(channels: int = 4) -> Any:
    return _seeded(
        diffusers.AutoencoderKL,
        block_out_channels=(8,),
        norm_num_groups=4,
        layers_per_block=1,
        latent_channels=channels,
        shift_factor=0.0,
    )


def dit() -> Life:
    """DiT, which makes images of classes."""
    call = {"class_labels": [1, 2], "num_inference_steps": 3, "output_type": "np"}
    return make_pipeline(make_dit(layers=2)), call


def pixart() -> Life:
    """PixArt-Sigma."""
    transformer = _seeded(
        diffusers.PixArtTransformer2DModel,
        sample_size=8, num_layers=3, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=32,
        in_channels=4, cross_attention_dim=24, out_channels=8, attention_bias=True, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
        use_additional_conditions=False,
    )  # fmt: skip
    pipe = diffusers.PixArtSigmaPipeline(None, None, _vae(), transformer, diffusers.DPMSolverMultistepScheduler())
    call = {
        "negative_prompt": None,
        "prompt_embeds": _embeddings(1, 8, 32),
        "prompt_attention_mask": torch.ones(1, 8),
        "negative_prompt_embeds": torch.zeros(1, 8, 32),
        "negative_prompt_attention_mask": torch.ones(1, 8),
        "num_inference_steps": 3,
        "height": 8,
        "width": 8,
        "use_resolution_binning": False,
        "output_type": "np",
    }
    return _finished(pipe), call


def sd3() -> Life:
    """Stable Diffusion 3."""
    transformer = _seeded(
        diffusers.SD3Transformer2DModel,
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=16, out_channels=4,
        pos_embed_max_size=8,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.StableDiffusion3Pipeline(transformer, scheduler, _vae(), None, None, None, None, None, None)
    call = {
        "prompt_embeds": _embeddings(1, 8, 32),
        "pooled_prompt_embeds": _embeddings(1, 16),
        "negative_prompt_embeds": torch.zeros(1, 8, 32),
        "negative_pooled_prompt_embeds": torch.zeros(1, 16),
        "num_inference_steps": 3,
        "height": 8,
        "width": 8,
        "output_type": "np",
    }
    return _finished(pipe), call


def flux() -> Life:
    """FLUX."""
    transformer = _seeded(
        diffusers.FluxTransformer2DModel,
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.FluxPipeline(scheduler, _vae(), None, None, None, None, transformer)
    call = {
        "prompt_embeds": _embeddings(1, 8, 32),
        "pooled_prompt_embeds": _embeddings(1, 16),
        "num_inference_steps": 3,
        "height": 8,
        "width": 8,
        "output_type": "np",
    }
    return _finished(pipe), call


def wan() -> Life:
    """Wan 2.2 with its two experts."""
    from tests.test_two_experts import expert, pipeline

    call = {
        "prompt_embeds": _embeddings(1, 8, 32),
        "negative_prompt_embeds": torch.zeros(1, 8, 32),
        "num_inference_steps": 6,
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "guidance_scale": 3.0,
        "output_type": "latent",
    }
    return pipeline(transformer=expert(1, layers=2), transformer_2=expert(2, layers=2)), call


def cogvideox() -> Life:
    """CogVideoX."""
    transformer = _seeded(
        diffusers.CogVideoXTransformer3DModel,
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=32, num_layers=2, sample_width=4, sample_height=4, sample_frames=5, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=8,
    )  # fmt: skip
    vae = _seeded(
        diffusers.AutoencoderKLCogVideoX,
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        temporal_compression_ratio=4,
    )  # fmt: skip
    pipe = diffusers.CogVideoXPipeline(None, None, vae, transformer, diffusers.CogVideoXDDIMScheduler())
    call = {
        "prompt_embeds": _embeddings(1, 8, 32),
        "negative_prompt_embeds": torch.zeros(1, 8, 32),
        "num_inference_steps": 3,
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "output_type": "latent",
    }
    return _finished(pipe), call
