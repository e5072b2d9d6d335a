"""Models of videos in which prompt and latents attend together, or with cross-attention as in PixArt."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo.entry import Entry, Maker

_COGVIDEO = {
    "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "time_embed_dim": 4,
    "text_embed_dim": 8, "num_layers": 2, "sample_width": 8, "sample_height": 8, "sample_frames": 8, "patch_size": 2,
    "temporal_compression_ratio": 4, "max_text_seq_length": 5,
}  # fmt: skip


def _video(make: Maker, text: int) -> dict[str, Any]:
    return {"hidden_states": make.latents(4, 2), "encoder_hidden_states": make.text(text), "timestep": make.time()}


ENTRIES = [
    Entry(
        "HunyuanVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "patch_size": 2,
            "text_embed_dim": 16,
            "pooled_projection_dim": 8,
            "rope_axes_dim": (4, 4, 4),
        },
        lambda make: (
            _video(make, 16)
            | {
                "encoder_attention_mask": make.mask(),
                "guidance": make.ones(make.batch) * 1e3,
                "pooled_projections": make.normal(make.batch, 8),
            }
        ),
    ),
    Entry(
        "CogVideoXTransformer3DModel",
        _COGVIDEO,
        lambda make: {
            "hidden_states": make.normal(make.batch, 2, 4, make.size, make.size),
            "encoder_hidden_states": make.text(8),
            "timestep": make.time(),
        },
        other_prompt=None,
    ),
    Entry(
        "ConsisIDTransformer3DModel",
        _COGVIDEO,
        lambda make: {
            "hidden_states": make.normal(make.batch, 2, 4, make.size, make.size),
            "encoder_hidden_states": make.text(8),
            "timestep": make.time(),
        },
        other_prompt=None,
        other_size=None,
    ),
    Entry(
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 8,
            "out_channels": 8,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "num_layers": 2,
            "caption_channels": 16,
        },
        lambda make: {
            "hidden_states": make.normal(make.batch, 2 * make.size**2, 8),
            "encoder_hidden_states": make.text(16),
            "timestep": make.time(),
            "encoder_attention_mask": make.mask(),
            "num_frames": 2,
            "height": make.size,
            "width": make.size,
        },
    ),
    Entry(
        "JoyImageEditTransformer3DModel",
        {
            "in_channels": 4,
            "hidden_size": 24,
            "num_attention_heads": 2,
            "text_dim": 8,
            "num_layers": 2,
            "rope_dim_list": [4, 4, 4],
        },
        lambda make: _video(make, 8),
    ),
    Entry(
        "MotifVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 1,
            "num_single_layers": 1,
            "text_embed_dim": 16,
            "rope_axes_dim": (4, 4, 4),
        },
        lambda make: _video(make, 16),
    ),
    Entry(
        "MochiTransformer3DModel",
        {
            "patch_size": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "pooled_projection_dim": 16,
            "in_channels": 4,
            "text_embed_dim": 16,
            "time_embed_dim": 4,
            "max_sequence_length": 5,
        },
        lambda make: _video(make, 16) | {"encoder_attention_mask": make.mask(torch.bool)},
        other_prompt=None,
    ),
    Entry(
        "AllegroTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "cross_attention_dim": 24,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 8,
            "caption_channels": 24,
        },
        lambda make: _video(make, 24) | {"encoder_attention_mask": make.mask(torch.bool)},
    ),
    Entry(
        "LatteTransformer3DModel",
        {
            "sample_size": 8,
            "num_layers": 2,
            "patch_size": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "caption_channels": 8,
            "in_channels": 4,
            "cross_attention_dim": 16,
            "out_channels": 8,
            "attention_bias": True,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "video_length": 2,
        },
        lambda make: _video(make, 8),
        other_size=None,
    ),
    Entry(
        "EasyAnimateTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 2,
            "sample_width": 8,
            "sample_height": 8,
            "num_layers": 1,
            "mmdit_layers": 1,
            "time_embed_dim": 4,
            "text_embed_dim": 16,
        },
        lambda make: _video(make, 16),
    ),
    Entry(
        "Kandinsky5Transformer3DModel",
        {
            "in_visual_dim": 4,
            "in_text_dim": 12,
            "in_text_dim2": 13,
            "time_dim": 16,
            "out_visual_dim": 4,
            "model_dim": 16,
            "ff_dim": 32,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (2, 2, 4),
        },
        lambda make: {
            "hidden_states": make.normal(make.batch, 2, make.size, make.size, 4),
            "encoder_hidden_states": make.text(12),
            "timestep": make.time(),
            "pooled_projections": make.normal(make.batch, 13),
            "visual_rope_pos": [torch.arange(2), torch.arange(make.size // 2), torch.arange(make.size // 2)],
            "text_rope_pos": torch.arange(make.prompt),
        },
    ),
    Entry(
        "SanaVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12,
            "cross_attention_dim": 24,
            "caption_channels": 8,
            "sample_size": 8,
            "rope_max_seq_len": 32,
        },
        lambda make: _video(make, 8),
    ),
]
