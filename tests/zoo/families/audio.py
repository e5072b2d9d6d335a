"""Models of audio."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo.entry import Entry, Maker

_ACE_STEP = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "in_channels": 12, "audio_acoustic_hidden_dim": 4, "sliding_window": 2,
}  # fmt: skip

_STABLE_AUDIO_3 = {
    "io_channels": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "cond_token_dim": 16, "global_cond_dim": 12,
    "local_add_cond_dim": 5, "timestep_features_dim": 16, "ff_mult": 2, "num_memory_tokens": 3,
}  # fmt: skip

_LONGCAT_AUDIO = {"dit_dim": 16, "dit_depth": 2, "dit_heads": 2, "dit_text_dim": 12, "latent_dim": 8}

_MUSIC_3 = {
    "in_channels": 4, "condition_dim": 8, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8,
    "ff_inner_dim": 32, "rotary_dim": 4, "fourier_embedding_dim": 16,
}  # fmt: skip


def _ace_step(make: Maker) -> dict[str, Any]:
    """Latents ``[batch, size, channels]`` with those of the source and a mask, from one timestep to the next."""
    time = make.unit_time()
    return {
        "hidden_states": make.normal(make.batch, make.size, 4), "timestep": time, "timestep_r": time / 2,
        "encoder_hidden_states": make.text(16), "context_latents": make.normal(make.batch, make.size, 8),
    }  # fmt: skip


def _stable_audio_3(make: Maker) -> dict[str, Any]:
    return {
        "hidden_states": make.normal(make.batch, 8, make.size), "timestep": make.unit_time(),
        "encoder_hidden_states": make.text(16), "global_hidden_states": make.normal(make.batch, 12),
        "encoder_attention_mask": make.mask(torch.bool), "local_add_cond": make.normal(make.batch, 5, make.size),
    }  # fmt: skip


def _longcat_audio(make: Maker) -> dict[str, Any]:
    return {
        "hidden_states": make.normal(make.batch, make.size, 8), "encoder_hidden_states": make.text(12),
        "encoder_attention_mask": make.mask(torch.bool), "timestep": make.unit_time(),
        "attention_mask": torch.ones(make.batch, make.size, dtype=torch.bool),
        "latent_cond": make.normal(make.batch, make.size, 8),
    }  # fmt: skip


def _music_3(make: Maker) -> dict[str, Any]:
    return {
        "hidden_states": make.normal(make.batch, 4, make.size), "timestep": make.unit_time(),
        "encoder_hidden_states": make.normal(make.batch, make.size, 8),
    }  # fmt: skip


ENTRIES = [
    Entry(
        "StableAudioDiTModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "num_key_value_attention_heads": 1,
            "out_channels": 4,
            "cross_attention_dim": 8,
            "time_proj_dim": 8,
            "global_states_input_dim": 8,
            "cross_attention_input_dim": 8,
        },
        lambda make: {
            "hidden_states": make.normal(make.batch, 4, make.size),
            "timestep": make.time(),
            "encoder_hidden_states": make.text(8),
            "global_hidden_states": make.normal(make.batch, 1, 8),
            "rotary_embedding": (make.normal(make.size + 1, 4), make.normal(make.size + 1, 4)),
        },
    ),
    Entry("StableAudio3DiTModel", _STABLE_AUDIO_3, _stable_audio_3),
    Entry("AceStepTransformer1DModel", _ACE_STEP, _ace_step),
    Entry("LongCatAudioDiTTransformer", _LONGCAT_AUDIO, _longcat_audio),
    Entry("MiniMaxMusic3Transformer1DModel", _MUSIC_3, _music_3, other_prompt=None),
]
