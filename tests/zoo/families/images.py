"""Models of images: self-attention over latents, with or without cross-attention to a prompt."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo.entry import Entry, Maker, simple


def _pixart(make: Maker) -> dict[str, Any]:
    extra = {"resolution": None, "aspect_ratio": None}
    return {
        "hidden_states": make.latents(4), "encoder_hidden_states": make.text(8), "timestep": make.time(),
        "added_cond_kwargs": extra, "encoder_attention_mask": make.mask(),
    }  # fmt: skip


def _pixart_alpha(make: Maker) -> dict[str, Any]:
    extra = {"resolution": make.ones(make.batch, 2) * 64, "aspect_ratio": make.ones(make.batch, 1)}
    return _pixart(make) | {"added_cond_kwargs": extra}


_PIXART = {
    "sample_size": 8, "num_layers": 2, "patch_size": 2, "attention_head_dim": 8, "num_attention_heads": 2,
    "in_channels": 4, "out_channels": 8, "cross_attention_dim": 16, "caption_channels": 8,
}  # fmt: skip


def _hunyuan_dit(make: Maker) -> dict[str, Any]:
    tokens = (make.size // 2) ** 2
    return {
        "hidden_states": make.latents(4), "timestep": make.time().to(make.dtype),
        "encoder_hidden_states": make.normal(make.batch, 4, 32), "text_embedding_mask": make.ones(make.batch, 4),
        "encoder_hidden_states_t5": make.normal(make.batch, 4, 32), "text_embedding_mask_t5": make.ones(make.batch, 4),
        "image_meta_size": make.ones(make.batch, 6) * 64, "style": torch.zeros(make.batch, dtype=torch.int64),
        "image_rotary_emb": [make.normal(tokens, 8), make.normal(tokens, 8)],
    }  # fmt: skip


_PART = {
    "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 16, "num_layers": 2, "norm_num_groups": 4,
}  # fmt: skip


def _simple_part(make: Maker) -> dict[str, Any]:
    """A call of a part of a U-Net."""
    return simple(16, 12)(make)


def _frames(make: Maker) -> dict[str, Any]:
    """Two frames of each video, one after the other along the first axis."""
    return {
        "hidden_states": make.normal(2 * make.batch, 16, make.size, make.size), "timestep": make.time(),
        "num_frames": 2,
    }  # fmt: skip


ENTRIES = [
    Entry(
        "DiTTransformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "sample_size": 8,
            "patch_size": 2,
            "num_embeds_ada_norm": 1000,
        },
        lambda make: {
            "hidden_states": make.latents(4),
            "timestep": make.time(),
            "class_labels": torch.randint(0, 1000, (make.batch,), generator=make.generator),
        },
        other_size=None,
        other_prompt=None,
    ),
    Entry("PixArtTransformer2DModel", _PIXART | {"use_additional_conditions": False}, _pixart, variant="-Sigma"),
    Entry(
        "PixArtTransformer2DModel",
        _PIXART | {"use_additional_conditions": True, "num_attention_heads": 3, "cross_attention_dim": 24},
        _pixart_alpha,
        variant="-Alpha",
    ),
    Entry(
        "Transformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "sample_size": 8,
            "patch_size": 2,
            "cross_attention_dim": 16,
            "caption_channels": 8,
            "attention_bias": True,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "use_additional_conditions": False,
        },
        _pixart,
    ),
    Entry(
        "HunyuanDiT2DModel",
        {
            "sample_size": 8,
            "num_layers": 2,
            "patch_size": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "cross_attention_dim": 32,
            "cross_attention_dim_t5": 32,
            "pooled_projection_dim": 16,
            "hidden_size": 16,
            "text_len": 4,
            "text_len_t5": 4,
        },
        _hunyuan_dit,
        other_prompt=None,
    ),
    Entry(
        "SanaTransformer2DModel",
        {
            "patch_size": 1,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 4,
            "num_attention_heads": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 4,
            "cross_attention_dim": 8,
            "caption_channels": 8,
            "sample_size": 8,
        },
        simple(4, 8),
    ),
    Entry(
        "PriorTransformer",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "embedding_dim": 12,
            "num_embeddings": 5,
            "additional_embeddings": 4,
        },
        lambda make: {
            "hidden_states": make.normal(make.batch, 12),
            "timestep": make.time(),
            "proj_embedding": make.normal(make.batch, 12),
            "encoder_hidden_states": make.text(12),
        },
        other_size=None,
        other_prompt=None,
    ),
    Entry(
        "DreamLiteTransformer2DModel",
        _PART | {"qk_norm": "rms_norm", "use_linear_projection": True, "cross_attention_dim": 12},
        _simple_part,
    ),
    Entry("TransformerTemporalModel", _PART, _frames, other_prompt=None),
]
