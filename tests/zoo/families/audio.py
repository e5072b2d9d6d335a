"""Models of audio."""

from __future__ import annotations

from tests.zoo.entry import Entry

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
]
