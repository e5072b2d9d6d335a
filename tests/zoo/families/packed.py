"""Models that take several modalities, or the samples of a batch, packed into one sequence."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo.entry import Entry, Maker

_COSMOS_3 = {
    "head_dim": 12, "hidden_size": 24, "intermediate_size": 32, "latent_channel": 4, "latent_patch_size": 1,
    "num_attention_heads": 2, "num_hidden_layers": 2, "num_key_value_heads": 1, "patch_latent_dim": 4,
    "rope_axes_dim": [2, 2, 2], "vocab_size": 32,
}  # fmt: skip

_MINIMAX_H3 = {
    "num_attention_heads": 2, "attention_head_dim": 16, "hidden_size": 24, "num_layers": 2, "num_refiner_layers": 1,
    "ffn_dim": 32, "in_channels": 4, "audio_in_channels": 6, "text_dim": 8, "freq_dim": 8,
    "time_embed_hidden_dim": 24, "time_embed_dim": 16, "rope_freq_dim": 2,
}  # fmt: skip

_SOUNDS = 6


def _cosmos_3(make: Maker) -> dict[str, Any]:
    """One sample: a prompt and then the tokens of a video of one frame."""
    tokens = make.size**2
    video = torch.arange(make.prompt, make.prompt + tokens)
    places = torch.cat([torch.arange(make.prompt)[:, None].expand(-1, 3), make.grid().to(torch.int64) + make.prompt])
    return {
        "input_ids": torch.randint(0, 32, (make.prompt,), generator=make.generator),
        "text_indexes": torch.arange(make.prompt), "position_ids": places.T,
        "und_len": make.prompt, "sequence_length": make.prompt + tokens,
        "vision_tokens": [make.normal(1, 4, 1, make.size, make.size)],
        "vision_token_shapes": [(1, make.size, make.size)],
        "vision_sequence_indexes": video, "vision_mse_loss_indexes": video,
        "vision_timesteps": make.time()[:1].to(make.dtype).expand(tokens),
        "vision_noisy_frame_indexes": [torch.tensor([0])],
    }  # fmt: skip


def _minimax_h3(make: Maker) -> dict[str, Any]:
    """Prompt, sound and video: which of two noise levels a token has is an input of its own."""
    video = (make.size // 2) ** 2
    kinds = torch.cat([torch.ones(make.prompt), torch.full((_SOUNDS,), 2), torch.zeros(video)]).to(torch.int64)
    places = torch.arange(len(kinds))
    grid = torch.stack([places, places % 4, places % 2], dim=1).to(make.dtype)
    level = make.unit_time()[:1]
    return {
        "hidden_states": make.normal(make.batch, video, 16),
        "audio_hidden_states": make.normal(make.batch, _SOUNDS, 6), "encoder_hidden_states": make.text(8),
        "timestep": torch.cat([level, level / 2]), "timestep_indices": (kinds == 2).to(torch.int64),
        "token_tags": kinds, "position_ids": grid, "text_indices": places[: make.prompt],
        "audio_indices": places[make.prompt : make.prompt + _SOUNDS], "video_indices": places[-video:],
    }  # fmt: skip


ENTRIES = [
    Entry("Cosmos3OmniTransformer", _COSMOS_3, _cosmos_3, timestep="vision_timesteps"),
    Entry("MiniMaxH3Transformer3DModel", _MINIMAX_H3, _minimax_h3),
]
