"""Kinds of models with their published configurations, and random inputs for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Call = dict[str, Any]

_TIMESTEPS = range(950, 0, -100)


@dataclass(frozen=True)
class Shape:
    """A kind of model.

    Attributes:
        cls: Class in diffusers.
        config: Arguments of its constructor, without the numbers of layers.
        layers: The published number of layers of each of its kinds of blocks.
        inputs: Makes the inputs of a batch other than the latents and the timestep.
        latents: Shape of the latents of one sample.
        said: Description in the table.
        pairs: Whether samples come in pairs, with and without their condition.
        unit_time: Whether timesteps go from 0 to 1 instead of 0 to 1000.
    """

    cls: str
    config: dict[str, Any]
    layers: tuple[int, ...]
    inputs: Callable[[torch.Generator, int], Call]
    latents: tuple[int, ...]
    said: str
    pairs: bool = True
    unit_time: bool = False

    def make(self, layers: tuple[int, ...]) -> nn.Module:
        """The model; parameters that start as zeros get random values, so that every part affects the output."""
        torch.manual_seed(0)
        model = self.outline(layers)
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
        return model

    def outline(self, layers: tuple[int, ...]) -> nn.Module:
        """The model as its constructor makes it."""
        counts = dict(zip(_COUNTS, layers, strict=False))
        import diffusers

        model: nn.Module = getattr(diffusers, self.cls)(**self.config, **counts)
        return model.eval()

    def calls(self, batch: int) -> list[Call]:
        """One call per timestep."""
        return [self._call(batch, step) for step in _TIMESTEPS]

    def _call(self, batch: int, step: int) -> Call:
        generator = torch.Generator().manual_seed(step)
        return {
            "hidden_states": torch.randn(batch, *self.latents, generator=generator),
            "timestep": torch.full((batch,), _unit(step) if self.unit_time else step),
            **self.inputs(generator, batch),
            "return_dict": False,
        }

    def check(self, batch: int) -> None:
        """Raise ValueError if the model does not accept this batch size."""
        least = 2 if self.pairs else 1
        if batch < least or batch % least:
            raise ValueError(
                f"a batch of {batch} is not possible: samples come in pairs, as with guidance; use an even number"
            )


def _unit(step: int) -> float:
    """Round to eighths: models multiply this by 1000 in their dtype, and bfloat16 has the middle one exactly."""
    return round(step / 125) / 8


_COUNTS = ("num_layers", "num_single_layers")


def _paired(pair: Tensor, batch: int) -> Tensor:
    """Repeat two samples to fill the batch."""
    return pair.repeat(batch // 2, *(1 for _ in pair.shape[1:]))


def _labels(_: torch.Generator, batch: int) -> Call:
    return {"class_labels": _paired(torch.tensor([1, 1000]), batch)}  # With and without a condition.


def _caption(generator: torch.Generator, batch: int) -> Call:
    return {
        "encoder_hidden_states": _paired(torch.randn(2, 300, 4096, generator=generator), batch),
        "encoder_attention_mask": torch.ones(batch, 300, dtype=torch.int64),
    }


def _joint(generator: torch.Generator, batch: int) -> Call:
    return {
        # 77 tokens of CLIP, 256 of T5.
        "encoder_hidden_states": _paired(torch.randn(2, 333, 4096, generator=generator), batch),
        "pooled_projections": _paired(torch.randn(2, 2048, generator=generator), batch),
    }


def _flux(size: int, text: int, width: int, pooled: int) -> Callable[[torch.Generator, int], Call]:
    """Inputs of FLUX for latents packed into `size` by `size` tokens."""

    def make(generator: torch.Generator, batch: int) -> Call:
        rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
        return {
            "encoder_hidden_states": torch.randn(batch, text, width, generator=generator),
            "pooled_projections": torch.randn(batch, pooled, generator=generator),
            "guidance": torch.full((batch,), 4.0),
            "img_ids": torch.stack([torch.zeros(size, size), rows, columns], -1).flatten(0, 1),
            "txt_ids": torch.zeros(text, 3),
        }

    return make


_DIT = {
    "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}  # fmt: skip
_PIXART = {
    "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "patch_size": 2,
    "sample_size": 64, "cross_attention_dim": 1152, "caption_channels": 4096, "interpolation_scale": 1,
    "use_additional_conditions": False,
}  # fmt: skip
_SD3 = {
    "num_attention_heads": 24, "attention_head_dim": 64, "in_channels": 16, "out_channels": 16, "patch_size": 2,
    "sample_size": 128, "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}  # fmt: skip
_SD35 = _SD3 | {"pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))}
_FLUX = {
    "in_channels": 64, "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096,
    "pooled_projection_dim": 768, "guidance_embeds": True, "axes_dims_rope": (16, 56, 56),
}  # fmt: skip
_TINY = _DIT | {"num_attention_heads": 2, "attention_head_dim": 32, "sample_size": 8}
_TINY_FLUX = _FLUX | {
    "in_channels": 16, "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 64,
    "pooled_projection_dim": 32, "axes_dims_rope": (8, 12, 12),
}  # fmt: skip

SHAPES = {
    "dit": Shape(
        "DiTTransformer2DModel", _DIT | {"sample_size": 32}, (28,), _labels, (4, 32, 32), "DiT-XL/2, 256 tokens"
    ),
    "dit-1024": Shape(
        "DiTTransformer2DModel", _DIT | {"sample_size": 64}, (28,), _labels, (4, 64, 64), "DiT-XL/2, 1024 tokens"
    ),
    "pixart-sigma": Shape(
        "PixArtTransformer2DModel",
        _PIXART,
        (28,),
        _caption,
        (4, 64, 64),
        "PixArt-Sigma-XL, 1024 tokens and 300 of text",
    ),
    "sd3-medium": Shape(
        "SD3Transformer2DModel", _SD3, (24,), _joint, (16, 64, 64), "SD3-medium, 1024 tokens and 333 of text"
    ),
    "sd3.5-medium": Shape(
        "SD3Transformer2DModel", _SD35, (24,), _joint, (16, 128, 128), "SD3.5-medium, 4096 tokens and 333 of text"
    ),
    "flux": Shape(
        "FluxTransformer2DModel",
        _FLUX,
        (19, 38),
        _flux(64, 512, 4096, 768),
        (4096, 64),
        "FLUX.1-dev, 4096 tokens and 512 of text",
        pairs=False,
        unit_time=True,
    ),
    "tiny": Shape("DiTTransformer2DModel", _TINY, (2,), _labels, (4, 8, 8), "a small DiT, to try the benchmark out"),
    "tiny-flux": Shape(
        "FluxTransformer2DModel",
        _TINY_FLUX,
        (1, 1),
        _flux(4, 7, 64, 32),
        (16, 16),
        "a small FLUX, to try the benchmark out",
        pairs=False,
        unit_time=True,
    ),
}
"""Kinds of models by name, with diffusers' published configurations."""
