"""Tiny diffusion transformers with random weights, one of each layout of adaLN, and calls of them.

==============  =======================================================================================
constructor     how the condition reaches the blocks
==============  =======================================================================================
tiny_dit        adaLN-Zero: each block computes six vectors from timestep and class
tiny_pixart     adaLN-single: one vector for all blocks, plus a table per block; cross attention
tiny_sd3        two streams, text and image, each with its own adaLN-Zero, in one attention
tiny_flux       two streams, then one; attention and feed-forward side by side; rotary embeddings
tiny_wan        a table per block in float32, video, rotary embeddings, cross attention
tiny_lumina2    gates and scales without shifts behind RMS norms; grouped queries
==============  =======================================================================================

``tiny_linears`` makes two linears, without adaLN: a model whose graph is short enough to be kept as golden text.

All adaLN layers have nonzero weights, unlike after initialization: else no pass could change an output.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

STEPS = (900.0, 500.0, 100.0)
"""Timesteps of :func:`example_calls`."""

_BLOCKS = {"attention_head_dim": 8, "num_attention_heads": 2, "in_channels": 4}


def tiny_dit(layers: int = 1, **options: Any) -> nn.Module:
    """A ``DiTTransformer2DModel`` for 8 x 8 latents of 4 channels and 1,000 classes.

    Args:
        layers: Number of blocks.
        options: Other arguments of the constructor.
    """
    config = {"out_channels": 8, "num_layers": layers, "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 1000}
    return _made("DiTTransformer2DModel", _BLOCKS | config | options)


def tiny_pixart(layers: int = 1, **options: Any) -> nn.Module:
    """A ``PixArtTransformer2DModel`` for 8 x 8 latents of 4 channels and prompts of 8 channels."""
    config = {
        "sample_size": 8, "num_layers": layers, "patch_size": 2, "out_channels": 8, "cross_attention_dim": 16,
        "caption_channels": 8, "use_additional_conditions": False,
    }  # fmt: skip
    return _made("PixArtTransformer2DModel", _BLOCKS | config | options)


def tiny_sd3(layers: int = 2, **options: Any) -> nn.Module:
    """An ``SD3Transformer2DModel`` for 8 x 8 latents of 4 channels and prompts of 12 channels."""
    config = {
        "sample_size": 8, "patch_size": 2, "num_layers": layers, "joint_attention_dim": 12, "out_channels": 4,
        "caption_projection_dim": 16, "pooled_projection_dim": 10, "pos_embed_max_size": 8, "qk_norm": "rms_norm",
    }  # fmt: skip
    return _made("SD3Transformer2DModel", _BLOCKS | config | options)


def tiny_flux(layers: int = 1, **options: Any) -> nn.Module:
    """A ``FluxTransformer2DModel`` for 64 packed latents of 4 channels, with as many single blocks as double blocks."""
    config = {
        "num_layers": layers, "num_single_layers": layers, "joint_attention_dim": 12, "axes_dims_rope": (2, 2, 4),
        "pooled_projection_dim": 10, "guidance_embeds": True,
    }  # fmt: skip
    return _made("FluxTransformer2DModel", _BLOCKS | config | options)


def tiny_wan(layers: int = 1, **options: Any) -> nn.Module:
    """A ``WanTransformer3DModel`` for 2 frames of 8 x 8 latents of 4 channels and prompts of 16 channels."""
    config = {
        "patch_size": (1, 2, 2), "attention_head_dim": 12, "out_channels": 4, "text_dim": 16, "freq_dim": 32,
        "ffn_dim": 32, "num_layers": layers, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 32,
    }  # fmt: skip
    return _made("WanTransformer3DModel", _BLOCKS | config | options)


def tiny_lumina2(layers: int = 1, **options: Any) -> nn.Module:
    """A ``Lumina2Transformer2DModel`` for 8 x 8 latents of 4 channels and prompts of 32 channels."""
    config = {
        "sample_size": 8, "in_channels": 4, "hidden_size": 24, "num_layers": layers, "num_refiner_layers": 1,
        "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 2, "axes_dim_rope": (4, 2, 2),
        "axes_lens": (64, 64, 64), "cap_feat_dim": 32,
    }  # fmt: skip
    return _made("Lumina2Transformer2DModel", config | options)


TINY: dict[str, Callable[..., nn.Module]] = {
    "dit": tiny_dit,
    "pixart": tiny_pixart,
    "sd3": tiny_sd3,
    "flux": tiny_flux,
    "wan": tiny_wan,
    "lumina2": tiny_lumina2,
}
"""The constructors by name, to run a test on every layout."""


class TinyLinears(nn.Module):
    """``y = second(gelu(first(x))) + timestep``, with 16 channels; only the first linear has a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        """Tokens ``[batch, tokens, 16]`` from such tokens and one timestep from 0 to 1 per sample, ``[batch]``."""
        return self.second(nn.functional.gelu(self.first(x))) + timestep[:, None, None]


def tiny_linears() -> nn.Module:
    """A :class:`TinyLinears`, for tests of a pass for linears and for golden texts."""
    torch.manual_seed(0)
    return TinyLinears().eval()


def _made(name: str, config: dict[str, Any]) -> nn.Module:
    import diffusers

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: nn.Module = getattr(diffusers, name)(**config).eval()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


def example_call(
    model: nn.Module, batch: int = 2, timestep: float | None = 500.0, size: int = 8, prompt: int = 5, seed: int = 0
) -> dict[str, Any]:
    """Keyword arguments of one call of a tiny model, in the model's dtype.

    Args:
        model: A model of this module.
        batch: Number of samples.
        timestep: The timestep of all samples, 0 to 1000; None for a random one per sample. Models that take timesteps
            from 0 to 1 get a thousandth of it.
        size: Height and width of the latents; the number of tokens of :func:`tiny_linears`.
        prompt: Length of the prompt.
        seed: Seed of the inputs.

    Raises:
        ValueError: If the model is not of a class that this module makes.
    """
    name = type(model).__name__
    if name not in _CALLS:
        raise ValueError(f"{name} is not a tiny model of fxquant.testing; write its call as a dict")
    generator = torch.Generator().manual_seed(seed)
    dtype = next(parameter.dtype for parameter in model.parameters())
    steps = torch.randint(0, 1000, (batch,), generator=generator)
    steps = steps if timestep is None else torch.full((batch,), int(timestep))

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator).to(dtype)

    return _CALLS[name](normal, steps, size, prompt, generator)


def example_calls(model: nn.Module, timesteps: Sequence[float] = STEPS, **options: Any) -> list[dict[str, Any]]:
    """One call per timestep, each with a seed of its own; options as for :func:`example_call`."""
    return [example_call(model, timestep=step, seed=seed, **options) for seed, step in enumerate(timesteps)]


def calibration(model: nn.Module, calls: Sequence[dict[str, Any]] | None = None) -> Callable[[], None]:
    """A function for ``fxquant.compile(calibrate=...)`` that makes these calls, by default :func:`example_calls`."""
    made = example_calls(model) if calls is None else calls

    @torch.no_grad()
    def calibrate() -> None:
        for call in made:
            model(**call)

    return calibrate


Normal = Callable[..., Tensor]


def _dit(normal: Normal, steps: Tensor, size: int, prompt: int, generator: torch.Generator) -> dict[str, Any]:
    latents = normal(4, size, size)
    labels = torch.randint(0, 10, (len(steps),), generator=generator)
    return {"hidden_states": latents, "timestep": steps, "class_labels": labels}


def _linears(normal: Normal, steps: Tensor, size: int, prompt: int, generator: torch.Generator) -> dict[str, Any]:
    tokens = normal(size, 16)
    return {"x": tokens, "timestep": steps.to(tokens.dtype) / 1000}


def _text(*latents: int, channels: int) -> Callable[..., dict[str, Any]]:
    def make(normal: Normal, steps: Tensor, size: int, prompt: int, generator: torch.Generator) -> dict[str, Any]:
        hidden = normal(*latents, size, size)
        return {"hidden_states": hidden, "encoder_hidden_states": normal(prompt, channels), "timestep": steps}

    return make


def _pixart(normal: Normal, steps: Tensor, size: int, prompt: int, generator: torch.Generator) -> dict[str, Any]:
    call = _text(4, channels=8)(normal, steps, size, prompt, generator)
    mask = torch.ones(len(steps), prompt, dtype=torch.int64)
    extra = {"resolution": None, "aspect_ratio": None}
    return call | {"added_cond_kwargs": extra, "encoder_attention_mask": mask}


def _sd3(normal: Normal, steps: Tensor, size: int, prompt: int, generator: torch.Generator) -> dict[str, Any]:
    call = _text(4, channels=12)(normal, steps, size, prompt, generator)
    return call | {"pooled_projections": normal(10)}


def _flux(normal: Normal, steps: Tensor, size: int, prompt: int, generator: torch.Generator) -> dict[str, Any]:
    latents, text, pooled = normal(size**2, 4), normal(prompt, 12), normal(10)
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    places = torch.stack([torch.zeros(size**2, dtype=torch.int64), rows.flatten(), columns.flatten()], dim=1)
    return {
        "hidden_states": latents, "encoder_hidden_states": text, "pooled_projections": pooled,
        "timestep": steps.to(latents.dtype) / 1000, "guidance": torch.ones(len(steps), dtype=latents.dtype),
        "img_ids": places.to(latents.dtype), "txt_ids": torch.zeros(prompt, 3, dtype=latents.dtype),
    }  # fmt: skip


def _lumina2(normal: Normal, steps: Tensor, size: int, prompt: int, generator: torch.Generator) -> dict[str, Any]:
    call = _text(4, channels=32)(normal, steps, size, prompt, generator)
    mask = torch.ones(len(steps), prompt, dtype=torch.bool)
    return call | {"timestep": steps.to(call["hidden_states"].dtype) / 1000, "encoder_attention_mask": mask}


_CALLS: dict[str, Callable[..., dict[str, Any]]] = {
    "TinyLinears": _linears,
    "DiTTransformer2DModel": _dit,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "WanTransformer3DModel": _text(4, 2, channels=16),
    "Lumina2Transformer2DModel": _lumina2,
}
