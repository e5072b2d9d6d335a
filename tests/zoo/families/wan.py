"""Wan, and the models that share its blocks."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
from torch import Tensor

from tests.zoo.entry import Entry, Maker

_WAN = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
    "text_dim": 16, "freq_dim": 32, "ffn_dim": 32, "num_layers": 2, "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32,
}  # fmt: skip


def _wan(make: Maker) -> dict[str, Any]:
    return {
        "hidden_states": make.latents(4, 2), "timestep": make.time(), "encoder_hidden_states": make.text(16),
    }  # fmt: skip


_WAN_ANIMATE = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 12,
    "latent_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 32, "ffn_dim": 32, "num_layers": 2,
    "image_dim": 4, "rope_max_seq_len": 32, "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
    "motion_encoder_size": 16, "motion_style_dim": 8, "motion_dim": 4, "motion_encoder_dim": 16,
    "face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2, "inject_face_latents_blocks": 2,
}  # fmt: skip

_HELIOS = {name: value for name, value in _WAN.items() if name != "rope_max_seq_len"} | {"rope_dim": (4, 4, 4)}

_ANYFLOW = {name: value for name, value in _WAN.items() if name != "qk_norm"}


def _wan_animate(make: Maker) -> dict[str, Any]:
    """Latents of one reference and two frames with their condition and mask, a pose, and the face of five frames."""
    return _wan(make) | {
        "hidden_states": make.latents(12, 3), "encoder_hidden_states_image": make.normal(make.batch, 6, 4),
        "pose_hidden_states": make.latents(4, 2), "face_pixel_values": make.normal(make.batch, 3, 5, 16, 16),
    }  # fmt: skip


def _helios(make: Maker) -> dict[str, Any]:
    """Two frames, after six that are seen at three resolutions."""

    def frames(*numbers: int) -> Tensor:
        return torch.tensor(numbers).expand(make.batch, -1)

    return _wan(make) | {
        "indices_hidden_states": frames(6, 7),
        "indices_latents_history_short": frames(5), "latents_history_short": make.latents(4, 1),
        "indices_latents_history_mid": frames(4), "latents_history_mid": make.latents(4, 1),
        "indices_latents_history_long": frames(0, 1, 2, 3), "latents_history_long": make.latents(4, 4),
    }  # fmt: skip


def _anyflow(make: Maker) -> dict[str, Any]:
    """Latents ``[batch, frames, channels, height, width]``, from one timestep to the next, both for each frame."""
    time = make.time().to(make.dtype)[:, None].expand(-1, 2)
    return {
        "hidden_states": make.normal(make.batch, 2, 4, make.size, make.size), "timestep": time,
        "r_timestep": time / 2, "encoder_hidden_states": make.text(16),
    }  # fmt: skip


_ANYFLOW_FAR = _ANYFLOW | {"compressed_patch_size": (1, 4, 4), "full_chunk_limit": 3}

_WAN_ANIMATE_2 = {
    "text_len": 8, "in_dim": 12, "dim": 24, "ffn_dim": 32, "freq_dim": 32, "text_dim": 16, "out_dim": 4,
    "num_heads": 2, "num_layers": 2, "use_img_emb": False,
}  # fmt: skip


def _wan_animate_2(make: Maker) -> dict[str, Any]:
    """The first of two kinds of call: it fills a cache with keys and values of the reference."""
    grid = torch.tensor([[1, make.size // 2, make.size // 2]])
    return {
        "hidden_states": list(make.latents(4, 1).unbind()), "timestep": make.time(),
        "encoder_hidden_states": list(make.text(16).unbind()), "condition_latents": list(make.latents(8, 1).unbind()),
        "kv_cache": WanAnimate2KVCache(2), "kv_cache_mode": "extract", "seq_len": (make.size // 2) ** 2,
        "offset_grid_sizes": grid.expand(make.batch, -1),
    }  # fmt: skip


ENTRIES = [
    Entry("WanTransformer3DModel", _WAN, _wan),
    Entry("SkyReelsV2Transformer3DModel", _WAN, _wan),
    Entry("ChronoEditTransformer3DModel", _WAN, _wan),
    Entry(
        "WanVACETransformer3DModel",
        _WAN | {"vace_layers": [0], "vace_in_channels": 4},
        lambda make: (
            _wan(make) | {"control_hidden_states": make.latents(4, 2), "control_hidden_states_scale": torch.ones(1)}
        ),
    ),
    Entry("WanAnimateTransformer3DModel", _WAN_ANIMATE, _wan_animate),
    Entry("HeliosTransformer3DModel", _HELIOS, _helios),
    Entry("AnyFlowTransformer3DModel", _ANYFLOW, _anyflow),
    Entry("WanAnimate2Transformer3DModel", _WAN_ANIMATE_2, _wan_animate_2),
    Entry("AnyFlowFARTransformer3DModel", _ANYFLOW_FAR, lambda make: _anyflow(make) | {"chunk_partition": [1, 1]}),
]
