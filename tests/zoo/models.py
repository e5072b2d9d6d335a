"""Tiny configurations of the diffusion transformers in diffusers, with random weights and inputs for each.

An entry has the arguments of the constructor and a function that makes the inputs of a call for a batch size, a height
of latents and a prompt length. The library has no code for any of these classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from tests.zoo.own import OwnDiT


class Maker:
    """Makes random inputs of one call."""

    def __init__(self, batch: int, size: int, prompt: int, seed: int, step: float | None, dtype: torch.dtype) -> None:
        self.batch, self.size, self.prompt, self.dtype = batch, size, prompt, dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.step = step

    def normal(self, *shape: int) -> Tensor:
        """Normal random values in the dtype of the call, made in float32 so that all dtypes have the same values."""
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def latents(self, channels: int, *frames: int) -> Tensor:
        """``[batch, channels, *frames, size, size]``."""
        return self.normal(self.batch, channels, *frames, self.size, self.size)

    def tokens(self, channels: int) -> Tensor:
        """Packed latents ``[batch, size * size, channels]``."""
        return self.normal(self.batch, self.size**2, channels)

    def text(self, channels: int) -> Tensor:
        """A prompt ``[batch, prompt, channels]``."""
        return self.normal(self.batch, self.prompt, channels)

    def mask(self, dtype: torch.dtype = torch.int64) -> Tensor:
        """A mask of the whole prompt ``[batch, prompt]``."""
        return torch.ones(self.batch, self.prompt, dtype=dtype)

    def time(self) -> Tensor:
        """Timesteps 0 to 1000 ``[batch]``, int64: the same for all samples, or one per sample."""
        if self.step is not None:
            return torch.full((self.batch,), int(self.step))
        return torch.randint(0, 1000, (self.batch,), generator=self.generator)

    def unit_time(self) -> Tensor:
        """Timesteps 0 to 1 ``[batch]``."""
        return self.time().to(self.dtype) / 1000

    def grid(self, axes: int = 3) -> Tensor:
        """Positions of packed latents ``[size * size, axes]``."""
        rows, columns = torch.meshgrid(torch.arange(self.size), torch.arange(self.size), indexing="ij")
        columns_ = [rows.flatten(), columns.flatten()]
        zeros = [torch.zeros(self.size**2, dtype=torch.int64)]
        return torch.stack([*zeros, *columns_, *zeros * (axes - 3)], dim=1).to(self.dtype)

    def no_grid(self, axes: int = 3) -> Tensor:
        """Positions of a prompt ``[prompt, axes]``."""
        return torch.zeros(self.prompt, axes, dtype=self.dtype)

    def ones(self, *shape: int) -> Tensor:
        """Ones in the dtype of the call."""
        return torch.ones(shape, dtype=self.dtype)


@dataclass(frozen=True, eq=False)
class Entry:
    """One tiny model.

    Attributes:
        name: Class name in diffusers.
        config: Arguments of its constructor.
        inputs: Makes the keyword arguments of a call.
        size: Height and width of the latents.
        prompt: Length of the prompt.
        timestep: Name of the timestep argument.
        other_size: Another height that the model accepts, or None.
        other_prompt: Another prompt length that the model accepts, or None.
        variant: Distinguishes entries of the same class.
        after: Function that is applied to the new model.
        make: Class of the model, if it is not from diffusers.
    """

    name: str
    config: dict[str, Any]
    inputs: Callable[[Maker], dict[str, Any]]
    size: int = 8
    prompt: int = 5
    timestep: str = "timestep"
    other_size: int | None = 4
    other_prompt: int | None = 7
    variant: str = ""
    after: Callable[[Any], Any] = field(default=lambda model: None)
    make: Callable[..., nn.Module] | None = None

    @property
    def id(self) -> str:
        """Name of the test."""
        return self.name.replace("Transformer", "").removesuffix("Model") + self.variant

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model, with weights with which every part affects the output."""
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = (self.make or getattr(diffusers, self.name))(**self.config).eval()
        for name, parameter in model.named_parameters():
            flat = parameter.detach().flatten()
            if flat.numel() and bool((flat == flat[0]).all()):  # Zeros of adaLN-Zero, ones of norms, zeros of biases.
                value = float(flat[0]) if name.endswith("weight") and parameter.dim() == 1 else 0.0
                nn.init.normal_(parameter, mean=value, std=0.1 if parameter.dim() < 2 else 0.2)
        self.after(model)
        return model.to(dtype)

    def call(
        self,
        batch: int = 2,
        *,
        size: int | None = None,
        prompt: int | None = None,
        seed: int = 0,
        step: float | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, Any]:
        """Keyword arguments of a call."""
        return self.inputs(Maker(batch, size or self.size, prompt or self.prompt, seed, step, dtype))


def _pixart(make: Maker) -> dict[str, Any]:
    extra = {"resolution": None, "aspect_ratio": None}
    return {
        "hidden_states": make.latents(4), "encoder_hidden_states": make.text(8), "timestep": make.time(),
        "added_cond_kwargs": extra, "encoder_attention_mask": make.mask(),
    }  # fmt: skip


def _pixart_alpha(make: Maker) -> dict[str, Any]:
    extra = {"resolution": make.ones(make.batch, 2) * 64, "aspect_ratio": make.ones(make.batch, 1)}
    return _pixart(make) | {"added_cond_kwargs": extra}


_PIXART = {
    "sample_size": 8, "num_layers": 2, "patch_size": 2, "attention_head_dim": 8, "num_attention_heads": 2,
    "in_channels": 4, "out_channels": 8, "cross_attention_dim": 16, "caption_channels": 8,
}  # fmt: skip


def _flux(make: Maker, **extra: Any) -> dict[str, Any]:
    return {
        "hidden_states": make.tokens(4), "encoder_hidden_states": make.text(12), "timestep": make.unit_time(),
        "img_ids": make.grid(), "txt_ids": make.no_grid(), **extra,
    }  # fmt: skip


_FLUX = {
    "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2,
    "joint_attention_dim": 12, "axes_dims_rope": (2, 2, 4),
}  # fmt: skip


def _hunyuan_dit(make: Maker) -> dict[str, Any]:
    tokens = (make.size // 2) ** 2
    return {
        "hidden_states": make.latents(4), "timestep": make.time().to(make.dtype),
        "encoder_hidden_states": make.normal(make.batch, 4, 32), "text_embedding_mask": make.ones(make.batch, 4),
        "encoder_hidden_states_t5": make.normal(make.batch, 4, 32), "text_embedding_mask_t5": make.ones(make.batch, 4),
        "image_meta_size": make.ones(make.batch, 6) * 64, "style": torch.zeros(make.batch, dtype=torch.int64),
        "image_rotary_emb": [make.normal(tokens, 8), make.normal(tokens, 8)],
    }  # fmt: skip


def _cogview(make: Maker) -> dict[str, Any]:
    sizes = {name: make.ones(make.batch, 2) * 8 for name in ("original_size", "target_size", "crop_coords")}
    return {
        "hidden_states": make.latents(4), "encoder_hidden_states": make.text(32), "timestep": make.time(), **sizes,
    }  # fmt: skip


_COGVIDEO = {
    "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "time_embed_dim": 4,
    "text_embed_dim": 8, "num_layers": 2, "sample_width": 8, "sample_height": 8, "sample_frames": 8, "patch_size": 2,
    "temporal_compression_ratio": 4, "max_text_seq_length": 5,
}  # fmt: skip

_WAN = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
    "text_dim": 16, "freq_dim": 32, "ffn_dim": 32, "num_layers": 2, "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32,
}  # fmt: skip


def _wan(make: Maker) -> dict[str, Any]:
    return {
        "hidden_states": make.latents(4, 2), "timestep": make.time(), "encoder_hidden_states": make.text(16),
    }  # fmt: skip


def _omnigen(make: Maker) -> dict[str, Any]:
    tokens = make.prompt + 1 + (make.size // 2) ** 2
    return {
        "hidden_states": make.latents(4), "timestep": make.unit_time(),
        "input_ids": torch.randint(1, 100, (make.batch, make.prompt), generator=make.generator),
        "input_img_latents": [], "input_image_sizes": {},
        "attention_mask": make.ones(make.batch, tokens, tokens),  # An integer mask overflows in float64.
        "position_ids": torch.arange(tokens)[None].repeat(make.batch, 1),
    }  # fmt: skip


def _video(make: Maker, text: int) -> dict[str, Any]:
    return {"hidden_states": make.latents(4, 2), "encoder_hidden_states": make.text(text), "timestep": make.time()}


def _simple(channels: int, text: int) -> Callable[[Maker], dict[str, Any]]:
    return lambda make: {
        "hidden_states": make.latents(channels),
        "encoder_hidden_states": make.text(text),
        "timestep": make.time(),
    }


def _own(make: Maker) -> dict[str, Any]:
    labels = torch.randint(0, 10, (make.batch,), generator=make.generator)
    return {"x": make.latents(4), "t": make.time(), "y": labels}


def _fuse(model: Any) -> None:
    model.fuse_qkv_projections()


def _run_all_experts(model: Any) -> None:
    """Let each expert see all tokens, weighted by the router: the same function without branches on computed values."""

    def all_experts(self: Any, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        shape = len(x), self.num_activated_experts
        shares = x.new_zeros(len(x), len(self.experts)).scatter(1, indices.view(shape), weights.view(shape))
        outputs = [expert(x) * share for expert, share in zip(self.experts, shares.split(1, dim=1), strict=True)]
        return sum(outputs[1:], outputs[0])

    for module in model.modules():
        if hasattr(module, "moe_infer"):
            module.moe_infer = partial(all_experts, module)


ENTRIES = [
    Entry(
        "DiTTransformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "sample_size": 8,
            "patch_size": 2,
            "num_embeds_ada_norm": 1000,
        },
        lambda make: {
            "hidden_states": make.latents(4),
            "timestep": make.time(),
            "class_labels": torch.randint(0, 1000, (make.batch,), generator=make.generator),
        },
        other_size=None,
        other_prompt=None,
    ),
    Entry("PixArtTransformer2DModel", _PIXART | {"use_additional_conditions": False}, _pixart, variant="-Sigma"),
    Entry(
        "PixArtTransformer2DModel",
        _PIXART | {"use_additional_conditions": True, "num_attention_heads": 3, "cross_attention_dim": 24},
        _pixart_alpha,
        variant="-Alpha",
    ),
    Entry(
        "SD3Transformer2DModel",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "caption_projection_dim": 16,
            "out_channels": 4,
            "pooled_projection_dim": 10,
            "pos_embed_max_size": 8,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
        lambda make: _simple(4, 12)(make) | {"pooled_projections": make.normal(make.batch, 10)},
    ),
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
        "AuraFlowTransformer2DModel",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "caption_projection_dim": 16,
            "pos_embed_max_size": 64,
        },
        lambda make: _simple(4, 12)(make) | {"timestep": make.unit_time()},
    ),
    Entry(
        "HunyuanDiT2DModel",
        {
            "sample_size": 8,
            "num_layers": 2,
            "patch_size": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "cross_attention_dim": 32,
            "cross_attention_dim_t5": 32,
            "pooled_projection_dim": 16,
            "hidden_size": 16,
            "text_len": 4,
            "text_len_t5": 4,
        },
        _hunyuan_dit,
        other_prompt=None,
    ),
    Entry(
        "HunyuanVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "patch_size": 2,
            "text_embed_dim": 16,
            "pooled_projection_dim": 8,
            "rope_axes_dim": (4, 4, 4),
        },
        lambda make: (
            _video(make, 16)
            | {
                "encoder_attention_mask": make.mask(),
                "guidance": make.ones(make.batch) * 1e3,
                "pooled_projections": make.normal(make.batch, 8),
            }
        ),
    ),
    Entry(
        "HunyuanImageTransformer2DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "patch_size": (1, 1),
            "text_embed_dim": 16,
            "rope_axes_dim": (4, 4),
        },
        lambda make: (
            _simple(4, 16)(make) | {"timestep": make.time().to(make.dtype), "encoder_attention_mask": make.mask()}
        ),
    ),
    Entry(
        "SanaTransformer2DModel",
        {
            "patch_size": 1,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 4,
            "num_attention_heads": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 4,
            "cross_attention_dim": 8,
            "caption_channels": 8,
            "sample_size": 8,
        },
        _simple(4, 8),
    ),
    Entry(
        "Lumina2Transformer2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 2,
            "axes_dim_rope": (4, 2, 2),
            "axes_lens": (64, 64, 64),
            "cap_feat_dim": 32,
        },
        lambda make: (
            _simple(4, 32)(make) | {"timestep": make.unit_time(), "encoder_attention_mask": make.mask(torch.bool)}
        ),
    ),
    Entry(
        "CogVideoXTransformer3DModel",
        _COGVIDEO,
        lambda make: {
            "hidden_states": make.normal(make.batch, 2, 4, make.size, make.size),
            "encoder_hidden_states": make.text(8),
            "timestep": make.time(),
        },
        other_prompt=None,
    ),
    Entry(
        "ConsisIDTransformer3DModel",
        _COGVIDEO,
        lambda make: {
            "hidden_states": make.normal(make.batch, 2, 4, make.size, make.size),
            "encoder_hidden_states": make.text(8),
            "timestep": make.time(),
        },
        other_prompt=None,
        other_size=None,
    ),
    Entry(
        "CogView3PlusTransformer2DModel",
        {
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "out_channels": 4,
            "text_embed_dim": 32,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "pos_embed_max_size": 8,
            "sample_size": 8,
        },
        _cogview,
    ),
    Entry(
        "CogView4Transformer2DModel",
        {
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "out_channels": 4,
            "text_embed_dim": 32,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "sample_size": 8,
        },
        _cogview,
    ),
    Entry(
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 8,
            "out_channels": 8,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "num_layers": 2,
            "caption_channels": 16,
        },
        lambda make: {
            "hidden_states": make.normal(make.batch, 2 * make.size**2, 8),
            "encoder_hidden_states": make.text(16),
            "timestep": make.time(),
            "encoder_attention_mask": make.mask(),
            "num_frames": 2,
            "height": make.size,
            "width": make.size,
        },
    ),
    Entry("WanTransformer3DModel", _WAN, _wan),
    Entry("SkyReelsV2Transformer3DModel", _WAN, _wan),
    Entry("ChronoEditTransformer3DModel", _WAN, _wan),
    Entry(
        "OmniGenTransformer2DModel",
        {
            "in_channels": 4,
            "patch_size": 2,
            "hidden_size": 16,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 32,
            "num_layers": 2,
            "pad_token_id": 0,
            "vocab_size": 100,
            "time_step_dim": 16,
            "pos_embed_max_size": 64,
            "rope_scaling": {"long_factor": [1.0] * 2, "short_factor": [1.0] * 2},
        },
        _omnigen,
    ),
    Entry(
        "PriorTransformer",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "embedding_dim": 12,
            "num_embeddings": 5,
            "additional_embeddings": 4,
        },
        lambda make: {
            "hidden_states": make.normal(make.batch, 12),
            "timestep": make.time(),
            "proj_embedding": make.normal(make.batch, 12),
            "encoder_hidden_states": make.text(12),
        },
        other_size=None,
        other_prompt=None,
    ),
    Entry(
        "Transformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "sample_size": 8,
            "patch_size": 2,
            "cross_attention_dim": 16,
            "caption_channels": 8,
            "attention_bias": True,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "use_additional_conditions": False,
        },
        _pixart,
    ),
    Entry(
        "ErnieImageTransformer2DModel",
        {
            "hidden_size": 24,
            "num_attention_heads": 2,
            "num_layers": 2,
            "ffn_hidden_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "text_in_dim": 8,
            "rope_axes_dim": (4, 4, 4),
        },
        lambda make: {
            "hidden_states": make.latents(4),
            "timestep": make.time(),
            "text_bth": make.text(8),
            "text_lens": torch.full((make.batch,), make.prompt),
        },
    ),
    Entry(
        "JoyImageEditTransformer3DModel",
        {
            "in_channels": 4,
            "hidden_size": 24,
            "num_attention_heads": 2,
            "text_dim": 8,
            "num_layers": 2,
            "rope_dim_list": [4, 4, 4],
        },
        lambda make: _video(make, 8),
    ),
    Entry(
        "MotifVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 1,
            "num_single_layers": 1,
            "text_embed_dim": 16,
            "rope_axes_dim": (4, 4, 4),
        },
        lambda make: _video(make, 16),
    ),
    Entry(
        "BriaFiboTransformer2DModel",
        _FLUX | {"text_encoder_dim": 6},
        lambda make: _flux(make, text_encoder_layers=[make.text(6), make.text(6)]),
    ),
    Entry(
        "Krea2Transformer2DModel",
        {
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 32,
            "timestep_embed_dim": 16,
            "text_hidden_dim": 16,
            "num_text_layers": 3,
            "text_num_attention_heads": 4,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 32,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 2, 2),
        },
        lambda make: {
            "hidden_states": make.tokens(4),
            "timestep": make.unit_time(),
            "encoder_hidden_states": make.normal(make.batch, make.prompt, 3, 16),
            "position_ids": torch.cat([make.no_grid(), make.grid()]),
        },
    ),
    Entry(
        "WanVACETransformer3DModel",
        _WAN | {"vace_layers": [0], "vace_in_channels": 4},
        lambda make: (
            _wan(make) | {"control_hidden_states": make.latents(4, 2), "control_hidden_states_scale": torch.ones(1)}
        ),
    ),
    Entry(
        "QwenImageTransformer2DModel",
        {
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": (4, 2, 2),
        },
        lambda make: {
            "hidden_states": make.tokens(16),
            "encoder_hidden_states": make.text(16),
            "encoder_hidden_states_mask": make.mask(),
            "timestep": make.unit_time(),
            "img_shapes": [[(1, make.size, make.size)]] * make.batch,
        },
    ),
    Entry(
        "MochiTransformer3DModel",
        {
            "patch_size": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "pooled_projection_dim": 16,
            "in_channels": 4,
            "text_embed_dim": 16,
            "time_embed_dim": 4,
            "max_sequence_length": 5,
        },
        lambda make: _video(make, 16) | {"encoder_attention_mask": make.mask(torch.bool)},
        other_prompt=None,
    ),
    Entry(
        "AllegroTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "cross_attention_dim": 24,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 8,
            "caption_channels": 24,
        },
        lambda make: _video(make, 24) | {"encoder_attention_mask": make.mask(torch.bool)},
    ),
    Entry(
        "LatteTransformer3DModel",
        {
            "sample_size": 8,
            "num_layers": 2,
            "patch_size": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "caption_channels": 8,
            "in_channels": 4,
            "cross_attention_dim": 16,
            "out_channels": 8,
            "attention_bias": True,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "video_length": 2,
        },
        lambda make: _video(make, 8),
        other_size=None,
    ),
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
    Entry(
        "EasyAnimateTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 2,
            "sample_width": 8,
            "sample_height": 8,
            "num_layers": 1,
            "mmdit_layers": 1,
            "time_embed_dim": 4,
            "text_embed_dim": 16,
        },
        lambda make: _video(make, 16),
    ),
    Entry(
        "Kandinsky5Transformer3DModel",
        {
            "in_visual_dim": 4,
            "in_text_dim": 12,
            "in_text_dim2": 13,
            "time_dim": 16,
            "out_visual_dim": 4,
            "model_dim": 16,
            "ff_dim": 32,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (2, 2, 4),
        },
        lambda make: {
            "hidden_states": make.normal(make.batch, 2, make.size, make.size, 4),
            "encoder_hidden_states": make.text(12),
            "timestep": make.time(),
            "pooled_projections": make.normal(make.batch, 13),
            "visual_rope_pos": [torch.arange(2), torch.arange(make.size // 2), torch.arange(make.size // 2)],
            "text_rope_pos": torch.arange(make.prompt),
        },
    ),
    Entry(
        "PRXTransformer2DModel",
        {
            "in_channels": 4,
            "patch_size": 2,
            "context_in_dim": 12,
            "hidden_size": 16,
            "mlp_ratio": 2.0,
            "num_heads": 2,
            "depth": 2,
            "axes_dim": [4, 4],
        },
        lambda make: _simple(4, 12)(make) | {"timestep": make.unit_time()},
    ),
    Entry(
        "SanaVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12,
            "cross_attention_dim": 24,
            "caption_channels": 8,
            "sample_size": 8,
            "rope_max_seq_len": 32,
        },
        lambda make: _video(make, 8),
    ),
    Entry(
        "HiDreamImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "caption_channels": [12, 16],
            "text_emb_dim": 16,
            "num_routed_experts": 2,
            "num_activated_experts": 1,
            "axes_dims_rope": (4, 2, 2),
            "max_resolution": (8, 8),
            "llama_layers": (0, 1),
            "force_inference_output": True,
        },
        lambda make: {
            "hidden_states": make.latents(4),
            "timesteps": make.time(),
            "encoder_hidden_states_t5": make.text(12),
            "encoder_hidden_states_llama3": make.normal(2, make.batch, make.prompt, 16),
            "pooled_embeds": make.normal(make.batch, 16),
        },
        timestep="timesteps",
    ),
    Entry("OwnDiT", {}, _own, timestep="t", other_prompt=None, make=OwnDiT),
    Entry(
        "OwnDiT",
        {"explicit": False, "gated": True},
        _own,
        timestep="t",
        other_prompt=None,
        variant="-gated",
        make=OwnDiT,
    ),
]

_HIDREAM = next(entry for entry in ENTRIES if entry.name == "HiDreamImageTransformer2DModel")
ENTRIES.append(replace(_HIDREAM, variant="-all-experts", after=_run_all_experts))
_SD3 = next(entry for entry in ENTRIES if entry.name == "SD3Transformer2DModel")
_FLUX1 = next(entry for entry in ENTRIES if entry.name == "FluxTransformer2DModel")
_HUNYUAN = next(entry for entry in ENTRIES if entry.name == "HunyuanDiT2DModel")
# diffusers cannot run fused projections and dual attention together.
_SD3 = replace(_SD3, config=_SD3.config | {"dual_attention_layers": ()})
ENTRIES += [replace(entry, variant="-fused", after=_fuse) for entry in (_SD3, _FLUX1, _HUNYUAN)]

REFUSED = {"HiDreamImageTransformer2DModel": "transformer_hidream_image.py"}
"""Models that branch on computed values, which a graph cannot do: names, and the files with the branches."""

SAMPLE = {
    *("DiT2D", "Flux2D", "HunyuanDiT2D", "LTXVideo3D", "OmniGen2D", "HunyuanImage2D", "ErnieImage2D", "QwenImage2D"),
    *("OwnDiT", "OwnDiT-gated"),
}
"""Identifiers of the models that ``make test`` balances; ``make test-all`` balances all.

Among them are open and fixed batch sizes, all kinds and costs of linears, and nearly all ops of all models.
"""

QUANTIZED_SAMPLE = {"DiT2D", "LTXVideo3D", "QwenImage2D", "OwnDiT-gated"}
"""Identifiers of the models that ``make test`` also quantizes and runs at other sizes."""

CAPTURED = [entry for entry in ENTRIES if entry.name + entry.variant not in REFUSED]
