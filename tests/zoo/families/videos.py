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


_HUNYUAN_15 = {
    "in_channels": 9, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1,
    "num_refiner_layers": 1, "text_embed_dim": 16, "text_embed_2_dim": 8, "image_embed_dim": 12,
    "rope_axes_dim": (4, 4, 4), "target_size": 16,
}  # fmt: skip

_FRAMEPACK = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1,
    "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 16, "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 4, 4), "has_image_proj": True, "image_proj_dim": 12, "has_clean_x_embedder": True,
}  # fmt: skip

_COSMOS = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2,
    "mlp_ratio": 2, "text_embed_dim": 16, "adaln_lora_dim": 4, "max_size": (4, 32, 32), "concat_padding_mask": False,
    "extra_pos_embed_type": None,
}  # fmt: skip

_KANDINSKY_6 = {
    "in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 12, "in_text_dim2": 13, "time_dim": 16, "model_dim": 16,
    "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (2, 2, 4), "in_audio_dim": 5,
    "out_audio_dim": 5,
}  # fmt: skip

_KANDINSKY_6_SR = {
    "in_visual_dim": 4, "out_visual_dim": 8, "time_dim": 16, "model_dim": 16, "ff_dim": 32, "num_visual_blocks": 2,
    "axes_dims": (2, 2, 4),
}  # fmt: skip

_JOY_PLUS = {
    "in_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "text_dim": 16, "num_layers": 2,
    "rope_dim_list": [4, 6, 6],
}  # fmt: skip

_SANA_WM = {
    "in_channels": 4, "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "softmax_every_n": 2,
    "linear_head_dim": 16, "caption_channels": 8, "mlp_ratio": 2.0, "chunk_plucker_channels": 8,
    "chunk_plucker_post_attn_blocks": 2,
}  # fmt: skip


def _hunyuan_15(make: Maker) -> dict[str, Any]:
    return _video(make, 16) | {
        "hidden_states": make.latents(9, 2), "timestep": make.time().to(make.dtype),
        "encoder_attention_mask": make.mask(), "encoder_hidden_states_2": make.normal(make.batch, 3, 8),
        "encoder_attention_mask_2": torch.ones(make.batch, 3, dtype=torch.int64),
        "image_embeds": make.normal(make.batch, 4, 12),
    }  # fmt: skip


def _framepack(make: Maker) -> dict[str, Any]:
    """Frames 7 and 8, after one clean frame and six further ones at a half and a quarter of the resolution."""
    return _video(make, 16) | {
        "encoder_attention_mask": make.mask(), "pooled_projections": make.normal(make.batch, 8),
        "image_embeds": make.normal(make.batch, 4, 12), "guidance": make.ones(make.batch) * 1e3,
        "indices_latents": torch.tensor([7, 8]), "latents_clean": make.latents(4, 1),
        "indices_latents_clean": torch.tensor([0]), "latents_history_2x": make.latents(4, 2),
        "indices_latents_history_2x": torch.tensor([5, 6]), "latents_history_4x": make.latents(4, 4),
        "indices_latents_history_4x": torch.tensor([1, 2, 3, 4]),
    }  # fmt: skip


def _kandinsky_6(make: Maker) -> dict[str, Any]:
    """Noise, the latents of a first frame, and a mask that marks it, with sound."""
    return {
        "hidden_states": make.normal(make.batch, 2, make.size, make.size, 9), "encoder_hidden_states": make.text(12),
        "pooled_projections": make.normal(make.batch, 13), "timestep": make.time(),
        "audio_hidden_states": make.normal(make.batch, 6, 5),
    }  # fmt: skip


def _joy_plus(make: Maker) -> dict[str, Any]:
    """An image to make and a reference image, in one row of patches."""
    side = make.size // 2
    return {
        "hidden_states": make.normal(make.batch, 2 * side**2, 4, 1, 2, 2), "encoder_hidden_states": make.text(16),
        "timestep": make.time(), "shape_list": [[(1, side, side)] * 2] * make.batch,
    }  # fmt: skip


def _sana_wm(make: Maker) -> dict[str, Any]:
    """Four frames of a camera that moves forward: poses ``[4, 4]`` and focal lengths and centers."""
    poses = torch.eye(4).repeat(make.batch, 4, 1, 1)
    poses[..., 2, 3] = torch.arange(4) / 10
    lens = torch.tensor([1.0, 1.0, 0.5, 0.5]) * make.size
    return {
        "hidden_states": make.latents(4, 4), "timestep": make.time().to(make.dtype)[:, None, None].expand(-1, 1, 4),
        "encoder_hidden_states": make.text(8)[:, None], "encoder_attention_mask": make.mask(),
        "camera_conditions": torch.cat([poses.flatten(2), lens.expand(make.batch, 4, 4)], -1).to(make.dtype),
        "chunk_plucker": make.latents(8, 4),
    }  # fmt: skip


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
    Entry("HunyuanVideo15Transformer3DModel", _HUNYUAN_15, _hunyuan_15),
    Entry("HunyuanVideoFramepackTransformer3DModel", _FRAMEPACK, _framepack),
    Entry("CosmosTransformer3DModel", _COSMOS, lambda make: _video(make, 16)),
    Entry("Kandinsky6Transformer3DModel", _KANDINSKY_6, _kandinsky_6),
    Entry(
        "Kandinsky6SRTransformer3DModel",
        _KANDINSKY_6_SR,
        lambda make: {"hidden_states": make.normal(make.batch, 2, make.size, make.size, 9), "timestep": make.time()},
        other_size=16,
        other_prompt=None,
    ),
    Entry("JoyImageEditPlusTransformer3DModel", _JOY_PLUS, _joy_plus),
    Entry("SanaWMTransformer3DModel", _SANA_WM, _sana_wm),
]
