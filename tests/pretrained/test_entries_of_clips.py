"""VAEs of clips, which carry features from chunk to chunk, and the other classes of VAEs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

import fxquant
from fxquant.capture.feature_caches import is_functional
from fxquant.errors import CaptureError, ConfigurationError
from fxquant.pretrained.entries import compilable
from fxquant.runtime.model import GraphModel


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def clip(vae: Any, frames: int = 3, batch: int = 1, seed: int = 0) -> Tensor:
    """A clip, decoded in chunks of one latent frame."""
    made: Tensor = vae.decode(noise(batch, 4, frames, 2, 2, seed=seed)).sample
    return made


@torch.no_grad()
def latents(vae: Any, frames: int = 9) -> Tensor:
    made: Tensor = vae.encode(noise(1, 3, frames, 4, 4)).latent_dist.mean
    return made


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def wan() -> AutoencoderKLWan:
    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=12, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4, scale_factor_spatial=2, scale_factor_temporal=2,
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def quantized(wan: AutoencoderKLWan) -> Any:
    return fxquant.compile_parts(wan, recipe="rtn-w8a16", calibrate=lambda: clip(wan))


@pytest.mark.slow
def test_features_are_carried_from_chunk_to_chunk(wan: AutoencoderKLWan, quantized: Any) -> None:
    """One graph for each form of the features: none yet, those of one chunk, those of two."""
    assert type(quantized) is AutoencoderKLWan and type(quantized.decoder) is GraphModel
    assert not is_functional(wan.decoder), "the float model does not change"
    assert off(clip(quantized), clip(wan)) < 0.05
    assert off(clip(quantized, frames=5, batch=2, seed=1), clip(wan, frames=5, batch=2, seed=1)) < 0.05
    assert len(quantized.decoder.graphs) == 3
    assert torch.equal(clip(quantized), clip(quantized)), "nothing is left of the last clip"
    assert torch.equal(latents(quantized), latents(wan))


def test_the_graphs_alone_are_exact(wan: AutoencoderKLWan) -> None:
    with compilable(wan, ["decoder"]) as parts:
        whole = copy.copy(wan)
        whole._modules = {**wan._modules, "decoder": fxquant.trace(parts["decoder"], timestep=None)}
        found = clip(whole, seed=1)
    assert torch.equal(found, clip(wan, seed=1))


@pytest.mark.slow
def test_it_is_read_back(quantized: Any, tmp_path: Path) -> None:
    quantized.save_pretrained(tmp_path / "vae")
    loaded = AutoencoderKLWan.from_pretrained(tmp_path / "vae")
    assert torch.equal(clip(loaded, seed=1), clip(quantized, seed=1))


def test_what_is_refused(wan: AutoencoderKLWan) -> None:
    options: dict[str, Any] = {"layers": "all", "timestep": None, "calibrate": lambda: clip(wan)}
    with pytest.raises(CaptureError, match=r"writes into its input 'feat_cache'.*fxquant\.compile_parts does this"):
        fxquant.compile(wan.decoder, recipe="rtn-w8a16", **options)
    with pytest.raises(ConfigurationError, match="quantized activations are only supported for conv1d and conv2d"):
        fxquant.compile_parts(wan, recipe="rtn-w8a8", calibrate=lambda: clip(wan))


def test_at_the_first_call(wan: AutoencoderKLWan, quantized: Any, tmp_path: Path) -> None:
    """The first chunk does not run all layers, so a clip of noise is decoded before it."""
    wan.save_pretrained(tmp_path / "vae")
    config = fxquant.FxQuantConfig("rtn-w8a16")
    made: Any = AutoencoderKLWan.from_pretrained(tmp_path / "vae", quantization_config=config)
    first = clip(made, frames=1, seed=1)
    assert type(made.decoder) is GraphModel and type(made.encoder) is not GraphModel
    assert made.decoder.plan.layers == quantized.decoder.plan.layers
    assert torch.equal(first, clip(quantized, frames=1, seed=1))
    assert torch.equal(clip(made, seed=1), clip(quantized, seed=1))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_an_encoder_at_the_first_call(tmp_path: Path) -> None:
    """Wan 2.2 cuts images in patches before it encodes them."""
    torch.manual_seed(0)
    wan: Any = AutoencoderKLWan(
        base_dim=12, decoder_base_dim=16, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True], is_residual=True, in_channels=12, out_channels=12, patch_size=2,
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4, scale_factor_spatial=8, scale_factor_temporal=2,
    ).eval()  # fmt: skip
    wan.save_pretrained(tmp_path / "vae")
    made: Any = AutoencoderKLWan.from_pretrained(
        tmp_path / "vae", quantization_config=fxquant.FxQuantConfig("rtn-w8a16")
    )
    video = noise(1, 3, 9, 16, 16)
    with torch.no_grad():
        assert off(made.encode(video).latent_dist.mean, wan.encode(video).latent_dist.mean) < 0.05
    assert type(made.encoder) is GraphModel
    assert all(layer.weight_bits == 8 for layer in made.encoder.plan.layers.values())


@pytest.mark.slow
def test_weights_that_each_call_computes() -> None:
    """Nothing of such a VAE would be quantized, which is not passed over in silence."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=4, decoder_input_channels=4, decoder_channels=4, downsampling_ratios=[2],
        channel_multiples=[1], audio_channels=2,
    ).eval()  # fmt: skip
    with pytest.raises(ConfigurationError, match=r"no layer of the decoder of this Auto.*weight_norm"):
        fxquant.compile_parts(vae, recipe="rtn-w8a16", calibrate=lambda: vae.decode(noise(1, 4, 8)))


def _kl(**options: Any) -> dict[str, Any]:
    two = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return {**two, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, **options}


_DC = {
    "in_channels": 3, "latent_channels": 4, "attention_head_dim": 2,
    "encoder_block_types": ("ResBlock", "EfficientViTBlock"), "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "encoder_layers_per_block": (1, 1),
    "decoder_layers_per_block": (1, 1), "encoder_qkv_multiscales": ((), (5,)), "decoder_qkv_multiscales": ((), (5,)),
    "upsample_block_type": "interpolate", "downsample_block_type": "stride_conv", "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
}  # fmt: skip
_LTX = {
    "latent_channels": 8, "block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4,
    "layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 5,
    "spatio_temporal_scaling": (True, True, False, False), "patch_size": 1, "patch_size_t": 1,
    "decoder_spatio_temporal_scaling": (True, True, False, False), "decoder_inject_noise": (False,) * 5,
    "upsample_residual": (False,) * 4, "upsample_factor": (1,) * 4, "timestep_conditioning": False,
    "encoder_causal": True, "decoder_causal": False,
}  # fmt: skip
_VIDEO = {"latent_channels": 4, "block_out_channels": (8,) * 4, "layers_per_block": 1}
CLASSES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "AutoencoderKL": (_kl(latent_channels=4), (1, 4, 8, 8)),
    "AutoencoderKLFlux2": (_kl(latent_channels=4), (1, 4, 8, 8)),
    "VQModel": (
        {name: value for name, value in _kl(latent_channels=3).items() if name != "layers_per_block"},
        (1, 3, 8, 8),
    ),
    "AutoencoderDC": (_DC, (1, 4, 8, 8)),
    "AutoencoderKLCogVideoX": (
        {"down_block_types": ("CogVideoXDownBlock3D",) * 4, "up_block_types": ("CogVideoXUpBlock3D",) * 4,
         "norm_num_groups": 2, **_VIDEO},
        (1, 4, 5, 4, 4),
    ),
    "AutoencoderKLLTXVideo": (_LTX, (1, 8, 2, 4, 4)),
    "AutoencoderKLHunyuanVideo": ({"norm_num_groups": 4, **_VIDEO}, (1, 4, 2, 4, 4)),
    "AutoencoderKLMochi": (
        {"latent_channels": 4, "encoder_block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4,
         "layers_per_block": (1,) * 5},
        (1, 4, 3, 4, 4),
    ),
    "AutoencoderKLMochi, two frames": (
        {"latent_channels": 4, "encoder_block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4,
         "layers_per_block": (1,) * 5},
        (1, 4, 2, 4, 4),
    ),
    "AutoencoderKLQwenImage": (
        {"base_dim": 12, "z_dim": 4, "dim_mult": [1, 2, 4], "num_res_blocks": 1, "temperal_downsample": [False, True]},
        (1, 4, 1, 4, 4),
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", CLASSES)
def test_every_class(name: str, tmp_path: Path) -> None:
    """Each keeps its class, and is written and read back."""
    options, shape = CLASSES[name]
    cls: Any = getattr(diffusers, name.partition(",")[0])
    torch.manual_seed(0)
    vae = cls(**options).eval()

    @torch.no_grad()
    def decode(model: Any, seed: int = 0) -> Tensor:
        made: Tensor = model.decode(noise(*shape, seed=seed)).sample
        return made

    made = fxquant.compile_parts(vae, recipe="rtn-w8a16", calibrate=lambda: decode(vae))
    assert type(made) is cls
    assert off(decode(made, 1), decode(vae, 1)) < 0.1
    save: Callable[..., None] = made.save_pretrained
    save(tmp_path / "vae")
    assert torch.equal(decode(cls.from_pretrained(tmp_path / "vae"), 1), decode(made, 1))
