"""FLUX, and the models of images that take packed latents and positions like it."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo.entry import Entry, Maker


def _flux(make: Maker, **extra: Any) -> dict[str, Any]:
    return {
        "hidden_states": make.tokens(4), "encoder_hidden_states": make.text(12), "timestep": make.unit_time(),
        "img_ids": make.grid(), "txt_ids": make.no_grid(), **extra,
    }  # fmt: skip


_FLUX = {
    "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2,
    "joint_attention_dim": 12, "axes_dims_rope": (2, 2, 4),
}  # fmt: skip

_FLUX_3 = {
    "in_channels": 4, "cond_in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8,
    "num_attention_heads": 2, "joint_attention_dim": 12, "timestep_channels": 16, "axes_dims_rope": (2, 2, 2, 2),
}  # fmt: skip


def _flux_3_edit(make: Maker) -> dict[str, Any]:
    """An edit: the reference image has as many tokens as the image."""
    reference = make.grid(4) + torch.tensor([1, 0, 0, 0])
    return _flux(
        make, img_ids=make.grid(4), txt_ids=make.no_grid(4), image_cond_hidden_states=make.tokens(4),
        image_cond_ids=reference, target_timestep=make.unit_time() / 2,
    )  # fmt: skip


ENTRIES = [
    Entry(
        "FluxTransformer2DModel",
        _FLUX | {"pooled_projection_dim": 10, "guidance_embeds": True},
        lambda make: _flux(make, pooled_projections=make.normal(make.batch, 10), guidance=make.ones(make.batch)),
    ),
    Entry(
        "Flux2Transformer2DModel",
        {
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "timestep_guidance_channels": 32,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        lambda make: _flux(make, img_ids=make.grid(4), txt_ids=make.no_grid(4), guidance=make.ones(make.batch)),
    ),
    Entry(
        "ChromaTransformer2DModel",
        _FLUX | {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1},
        lambda make: _flux(make, attention_mask=torch.ones(make.batch, make.prompt + make.size**2)),
    ),
    Entry(
        "BriaTransformer2DModel",
        _FLUX,
        _flux,
    ),
    Entry(
        "OvisImageTransformer2DModel",
        _FLUX | {"out_channels": 4},
        _flux,
    ),
    Entry(
        "LongCatImageTransformer2DModel",
        _FLUX | {"pooled_projection_dim": 12},
        _flux,
    ),
    Entry(
        "BriaFiboTransformer2DModel",
        _FLUX | {"text_encoder_dim": 6},
        lambda make: _flux(make, text_encoder_layers=[make.text(6), make.text(6)]),
    ),
    Entry(
        "Flux3Transformer2DModel",
        _FLUX_3,
        lambda make: _flux(make, img_ids=make.grid(4), txt_ids=make.no_grid(4)),
    ),
    Entry("Flux3Transformer2DModel", _FLUX_3 | {"flow_map": True}, _flux_3_edit, variant="-edit"),
]
