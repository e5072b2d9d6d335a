"""Lumina, and the models that refine prompt and latents with blocks of their own first: Z-Image, FIBO 2."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo.entry import Entry, Maker, simple

_LUMINA_2 = {
    "sample_size": 8, "in_channels": 4, "hidden_size": 24, "num_layers": 2, "num_refiner_layers": 1,
    "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 2, "axes_dim_rope": (4, 2, 2),
    "axes_lens": (64, 64, 64), "cap_feat_dim": 32,
}  # fmt: skip

_LUMINA_NEXT = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 24, "num_layers": 2, "num_attention_heads": 3,
    "num_kv_heads": 1, "multiple_of": 8, "cross_attention_dim": 8,
}  # fmt: skip

_Z_IMAGE = {
    "in_channels": 4, "dim": 16, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
    "cap_feat_dim": 12, "axes_dims": [4, 2, 2], "axes_lens": [256, 16, 16],
}  # fmt: skip

_FIBO_2 = {
    "in_channels": 4, "dim": 24, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 3, "cap_feat_dim": 12,
    "injection_layer_ids": (1,), "perceiver_num_layers": 1, "min_num_gist_tokens": 2, "max_num_gist_tokens": 4,
    "gist_step": 2, "gist_min_text_len": 2, "gist_max_text_len": 16, "axes_dims": (4, 2, 2), "axes_lens": (64, 16, 16),
}  # fmt: skip


def _lumina_next(make: Maker) -> dict[str, Any]:
    angles = make.normal(16, 16, 4).to(torch.float32)
    return simple(4, 8)(make) | {
        "timestep": make.unit_time(), "encoder_mask": make.mask(), "cross_attention_kwargs": {},
        "image_rotary_emb": torch.polar(torch.ones_like(angles), angles),
    }  # fmt: skip


def _z_image(make: Maker) -> dict[str, Any]:
    # One prompt per image, and each is a tensor of its own.
    return {
        "x": list(make.latents(4, 1).unbind()), "t": make.unit_time(), "cap_feats": list(make.text(12).unbind()),
    }  # fmt: skip


ENTRIES = [
    Entry("LuminaNextDiT2DModel", _LUMINA_NEXT, _lumina_next),
    Entry(
        "Lumina2Transformer2DModel",
        _LUMINA_2,
        lambda make: (
            simple(4, 32)(make) | {"timestep": make.unit_time(), "encoder_attention_mask": make.mask(torch.bool)}
        ),
    ),
    Entry("ZImageTransformer2DModel", _Z_IMAGE, _z_image, timestep="t"),
    Entry(
        "BriaFibo2Transformer2DModel",
        _FIBO_2,
        lambda make: {
            "hidden_states": make.latents(4),
            "timestep": make.unit_time(),
            "encoder_hidden_states": make.normal(make.batch, 2, make.prompt, 12),
        },
    ),
]
