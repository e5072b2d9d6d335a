"""Wan, and the models that share its blocks."""

from __future__ import annotations

from typing import Any

import torch

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
]
