"""Models of images in which prompt and latents attend together."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo.entry import Entry, Maker, simple


def _cogview(make: Maker) -> dict[str, Any]:
    sizes = {name: make.ones(make.batch, 2) * 8 for name in ("original_size", "target_size", "crop_coords")}
    return {
        "hidden_states": make.latents(4), "encoder_hidden_states": make.text(32), "timestep": make.time(), **sizes,
    }  # fmt: skip


def _omnigen(make: Maker) -> dict[str, Any]:
    tokens = make.prompt + 1 + (make.size // 2) ** 2
    return {
        "hidden_states": make.latents(4), "timestep": make.unit_time(),
        "input_ids": torch.randint(1, 100, (make.batch, make.prompt), generator=make.generator),
        "input_img_latents": [], "input_image_sizes": {},
        "attention_mask": make.ones(make.batch, tokens, tokens),  # An integer mask overflows in float64.
        "position_ids": torch.arange(tokens)[None].repeat(make.batch, 1),
    }  # fmt: skip


ENTRIES = [
    Entry(
        "SD3Transformer2DModel",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "caption_projection_dim": 16,
            "out_channels": 4,
            "pooled_projection_dim": 10,
            "pos_embed_max_size": 8,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
        lambda make: simple(4, 12)(make) | {"pooled_projections": make.normal(make.batch, 10)},
    ),
    Entry(
        "AuraFlowTransformer2DModel",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "caption_projection_dim": 16,
            "pos_embed_max_size": 64,
        },
        lambda make: simple(4, 12)(make) | {"timestep": make.unit_time()},
    ),
    Entry(
        "HunyuanImageTransformer2DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "patch_size": (1, 1),
            "text_embed_dim": 16,
            "rope_axes_dim": (4, 4),
        },
        lambda make: (
            simple(4, 16)(make) | {"timestep": make.time().to(make.dtype), "encoder_attention_mask": make.mask()}
        ),
    ),
    Entry(
        "Lumina2Transformer2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 2,
            "axes_dim_rope": (4, 2, 2),
            "axes_lens": (64, 64, 64),
            "cap_feat_dim": 32,
        },
        lambda make: (
            simple(4, 32)(make) | {"timestep": make.unit_time(), "encoder_attention_mask": make.mask(torch.bool)}
        ),
    ),
    Entry(
        "CogView3PlusTransformer2DModel",
        {
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "out_channels": 4,
            "text_embed_dim": 32,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "pos_embed_max_size": 8,
            "sample_size": 8,
        },
        _cogview,
    ),
    Entry(
        "CogView4Transformer2DModel",
        {
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "out_channels": 4,
            "text_embed_dim": 32,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "sample_size": 8,
        },
        _cogview,
    ),
    Entry(
        "OmniGenTransformer2DModel",
        {
            "in_channels": 4,
            "patch_size": 2,
            "hidden_size": 16,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 32,
            "num_layers": 2,
            "pad_token_id": 0,
            "vocab_size": 100,
            "time_step_dim": 16,
            "pos_embed_max_size": 64,
            "rope_scaling": {"long_factor": [1.0] * 2, "short_factor": [1.0] * 2},
        },
        _omnigen,
    ),
    Entry(
        "ErnieImageTransformer2DModel",
        {
            "hidden_size": 24,
            "num_attention_heads": 2,
            "num_layers": 2,
            "ffn_hidden_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "text_in_dim": 8,
            "rope_axes_dim": (4, 4, 4),
        },
        lambda make: {
            "hidden_states": make.latents(4),
            "timestep": make.time(),
            "text_bth": make.text(8),
            "text_lens": torch.full((make.batch,), make.prompt),
        },
    ),
    Entry(
        "Krea2Transformer2DModel",
        {
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 32,
            "timestep_embed_dim": 16,
            "text_hidden_dim": 16,
            "num_text_layers": 3,
            "text_num_attention_heads": 4,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 32,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 2, 2),
        },
        lambda make: {
            "hidden_states": make.tokens(4),
            "timestep": make.unit_time(),
            "encoder_hidden_states": make.normal(make.batch, make.prompt, 3, 16),
            "position_ids": torch.cat([make.no_grid(), make.grid()]),
        },
    ),
    Entry(
        "QwenImageTransformer2DModel",
        {
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": (4, 2, 2),
        },
        lambda make: {
            "hidden_states": make.tokens(16),
            "encoder_hidden_states": make.text(16),
            "encoder_hidden_states_mask": make.mask(),
            "timestep": make.unit_time(),
            "img_shapes": [[(1, make.size, make.size)]] * make.batch,
        },
    ),
    Entry(
        "PRXTransformer2DModel",
        {
            "in_channels": 4,
            "patch_size": 2,
            "context_in_dim": 12,
            "hidden_size": 16,
            "mlp_ratio": 2.0,
            "num_heads": 2,
            "depth": 2,
            "axes_dim": [4, 4],
        },
        lambda make: simple(4, 12)(make) | {"timestep": make.unit_time()},
    ),
    Entry(
        "HiDreamImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "caption_channels": [12, 16],
            "text_emb_dim": 16,
            "num_routed_experts": 2,
            "num_activated_experts": 1,
            "axes_dims_rope": (4, 2, 2),
            "max_resolution": (8, 8),
            "llama_layers": (0, 1),
            "force_inference_output": True,
        },
        lambda make: {
            "hidden_states": make.latents(4),
            "timesteps": make.time(),
            "encoder_hidden_states_t5": make.text(12),
            "encoder_hidden_states_llama3": make.normal(2, make.batch, make.prompt, 16),
            "pooled_embeds": make.normal(make.batch, 16),
        },
        timestep="timesteps",
    ),
]
