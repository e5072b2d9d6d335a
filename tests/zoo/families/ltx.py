"""LTX-Video and LTX-2, which makes sound too."""

from __future__ import annotations

from typing import Any

from tests.zoo.entry import Entry, Maker

_LTX = {
    "in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16,
    "num_layers": 2, "caption_channels": 16,
}  # fmt: skip

_LTX_2 = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16,
    "audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2, "audio_attention_head_dim": 4,
    "audio_cross_attention_dim": 8, "num_layers": 2, "caption_channels": 16, "rope_double_precision": False,
}  # fmt: skip

_SOUNDS = 6


def _ltx(make: Maker) -> dict[str, Any]:
    return {
        "hidden_states": make.normal(make.batch, 2 * make.size**2, 8), "encoder_hidden_states": make.text(16),
        "timestep": make.time(), "encoder_attention_mask": make.mask(),
        "num_frames": 2, "height": make.size, "width": make.size,
    }  # fmt: skip


def _ltx_2(make: Maker) -> dict[str, Any]:
    return {
        "hidden_states": make.normal(make.batch, 2 * make.size**2, 4),
        "audio_hidden_states": make.normal(make.batch, _SOUNDS, 4),
        "encoder_hidden_states": make.text(16), "audio_encoder_hidden_states": make.text(16),
        "timestep": make.time().to(make.dtype), "encoder_attention_mask": make.mask(),
        "audio_encoder_attention_mask": make.mask(), "num_frames": 2, "height": make.size, "width": make.size,
        "fps": 25.0, "audio_num_frames": _SOUNDS,
    }  # fmt: skip


def _ltx_2_3(make: Maker) -> dict[str, Any]:
    """A call of LTX-2.3, whose prompt is modulated by the noise level too, with one timestep per token."""
    level = make.time().to(make.dtype)
    return _ltx_2(make) | {
        "timestep": level[:, None].expand(-1, 2 * make.size**2), "audio_timestep": level[:, None].expand(-1, _SOUNDS),
        "audio_encoder_hidden_states": make.text(8), "sigma": level, "audio_sigma": level, "use_cross_timestep": True,
    }  # fmt: skip


def _refiner(make: Maker) -> dict[str, Any]:
    """A call with one timestep per token, and angles that the caller computes."""
    tokens = 2 * make.size**2
    angles = make.normal(make.batch, tokens, 16)
    return {
        "hidden_states": make.normal(make.batch, tokens, 4), "encoder_hidden_states": make.text(16),
        "timestep": make.time().to(make.dtype)[:, None].expand(-1, tokens),
        "video_rotary_emb": (angles.cos(), angles.sin()), "encoder_attention_mask": make.mask(make.dtype),
    }  # fmt: skip


ENTRIES = [
    Entry("LTXVideoTransformer3DModel", _LTX, _ltx),
    Entry("LTX2VideoTransformer3DModel", _LTX_2, _ltx_2),
    Entry(
        "LTX2VideoTransformer3DModel",
        _LTX_2
        | {"gated_attn": True, "cross_attn_mod": True, "audio_gated_attn": True, "audio_cross_attn_mod": True}
        | {"rope_type": "split", "use_prompt_embeddings": False, "perturbed_attn": True},
        _ltx_2_3,
        variant="-2.3",
    ),
    Entry("SanaWMLTX2RefinerTransformer3DModel", _LTX_2, _refiner),
]
