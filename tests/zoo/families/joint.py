"""Models of images in which prompt and latents attend together."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

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


_QWEN = {
    "out_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "axes_dims_rope": (4, 2, 2),
}  # fmt: skip

_IDEOGRAM_4 = {
    "in_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "intermediate_size": 24,
    "adaln_dim": 12, "llm_features_dim": 20, "mrope_section": (2, 1, 1),
}  # fmt: skip

_NUCLEUS = {
    "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "joint_attention_dim": 16, "axes_dims_rope": (4, 2, 2), "mlp_ratio": 6.0,
    "dense_moe_strategy": "leave_first_block_dense", "num_experts": 4, "moe_intermediate_dim": 24,
    "capacity_factors": 4.0,  # Each expert reads all tokens: noise that sends a token elsewhere would hide errors.
}  # fmt: skip

_GLM_IMAGE = {
    "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
    "text_embed_dim": 32, "time_embed_dim": 16, "condition_dim": 4, "prior_vq_quantizer_codebook_size": 20,
}  # fmt: skip


def _qwen_21(make: Maker) -> dict[str, Any]:
    # The encoder of vision and language gives one slot for 2 x 2 tokens of the image, after those of the prompt.
    slots = torch.arange(make.prompt + (make.size // 2) ** 2) >= make.prompt
    return {
        "hidden_states": make.tokens(16), "encoder_hidden_states": make.text(16), "timestep": make.unit_time(),
        "img_shapes": [[(1, make.size, make.size)]] * make.batch, "img_mask": slots.expand(make.batch, -1),
    }  # fmt: skip


def _ideogram_4(make: Maker) -> dict[str, Any]:
    # One sequence of text and image tokens. What is not of a kind is zero in the features of that kind.
    tokens = make.prompt + make.size**2
    text = torch.arange(tokens) < make.prompt
    places = torch.cat([torch.arange(make.prompt)[:, None].expand(-1, 3), 65536 + make.grid().to(torch.int64)])
    return {
        "hidden_states": make.normal(make.batch, tokens, 4), "timestep": make.unit_time(),
        "encoder_hidden_states": make.normal(make.batch, tokens, 20),
        "position_ids": places.expand(make.batch, -1, -1),
        "segment_ids": torch.zeros(make.batch, tokens, dtype=torch.int64),
        "indicator": torch.where(text, 3, 2).expand(make.batch, -1),
    }  # fmt: skip


def _nucleus(make: Maker) -> dict[str, Any]:
    return {
        "hidden_states": make.tokens(16), "encoder_hidden_states": make.text(16), "timestep": make.unit_time(),
        "encoder_hidden_states_mask": make.mask(torch.bool), "img_shapes": [(1, make.size, make.size)] * make.batch,
    }  # fmt: skip


def _fill_experts(model: nn.Module) -> None:
    """Weights of experts, which the class leaves uninitialized."""
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            nn.init.normal_(parameter, std=0.2)


def _glm_image(make: Maker) -> dict[str, Any]:
    sizes = {name: make.ones(make.batch, 2) * 8 for name in ("target_size", "crop_coords")}
    ids = torch.randint(0, 20, (make.batch, (make.size // 2) ** 2), generator=make.generator)
    return simple(4, 32)(make) | sizes | {"prior_token_id": ids, "prior_token_drop": torch.zeros_like(ids).bool()}


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
        _QWEN | {"in_channels": 16, "joint_attention_dim": 16},
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
    Entry("QwenImage21Transformer2DModel", _QWEN | {"in_channels": 16, "context_in_dim": 16}, _qwen_21),
    Entry("Ideogram4Transformer2DModel", _IDEOGRAM_4, _ideogram_4),
    Entry("NucleusMoEImageTransformer2DModel", _NUCLEUS, _nucleus, after=_fill_experts),
    Entry("GlmImageTransformer2DModel", _GLM_IMAGE, _glm_image),
]
