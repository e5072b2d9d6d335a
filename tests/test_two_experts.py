"""Pipelines with two transformers: both are calibrated in one run, each on the timesteps that it sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor

import fxquant
from fxquant.errors import AlreadyCompiledError, CalibrationError, ConfigurationError
from fxquant.runtime.model import GraphModel


def expert(seed: int, layers: int = 1) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=32, freq_dim=32, ffn_dim=32, num_layers=layers,
        rope_max_seq_len=32,
    ).eval()  # fmt: skip


def pipeline(second: bool = True, boundary: float | None = 0.875, **parts: Any) -> WanPipeline:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    given = {"transformer": expert(1), "transformer_2": expert(2) if second else None, **parts}
    pipe = WanPipeline(None, None, vae, scheduler, **given, boundary_ratio=boundary)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def clip(pipe: WanPipeline, seed: int = 0) -> Tensor:
    """Latents of a clip, from embeddings of a prompt."""
    generator = torch.Generator().manual_seed(seed)
    made = pipe(
        prompt_embeds=torch.randn(1, 8, 32, generator=generator),
        negative_prompt_embeds=torch.zeros(1, 8, 32),
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=6,
        guidance_scale=3.0,
        output_type="latent",
        generator=generator,
    )
    latents: Tensor = made.frames
    return latents


@pytest.mark.slow
def test_both_are_calibrated_in_one_run() -> None:
    pipe, runs = pipeline(), []
    expected = clip(pipe, seed=1)

    def calibrate() -> None:
        runs.append(clip(pipe))

    made = fxquant.compile_pipeline(pipe, recipe="ptq4dit-w8a8", calibrate=calibrate, measure=0)
    assert len(runs) == 1
    assert list(made) == ["transformer", "transformer_2"]
    assert (pipe.transformer, pipe.transformer_2) == (made["transformer"], made["transformer_2"])
    plans = [model.plan for model in made.values()]
    high, low = ([] if plan is None else plan.timesteps for plan in plans)
    assert high and low and min(high) >= 875 > max(low)
    assert len(high) + len(low) == 6
    found = clip(pipe, seed=1)
    assert not torch.equal(found, expected)
    assert (found - expected).norm() / expected.norm() < 0.03


@pytest.mark.slow
def test_one_may_be_missing() -> None:
    pipe = pipeline(second=False, boundary=None)
    made = fxquant.compile_pipeline(pipe, recipe="rtn-w8a8", calibrate=lambda: clip(pipe), measure=0)
    assert list(made) == ["transformer"]
    assert isinstance(pipe.transformer, GraphModel) and pipe.transformer_2 is None
    assert clip(pipe).isfinite().all()


def test_one_model_under_two_names() -> None:
    one = expert(1)
    pipe = pipeline(transformer=one, transformer_2=one)
    made = fxquant.compile_pipeline(pipe, recipe="rtn-w8a8", calibrate=lambda: clip(pipe), measure=0)
    assert made["transformer"] is made["transformer_2"] is pipe.transformer is pipe.transformer_2


@pytest.mark.slow
def test_an_error_names_the_model_and_leaves_the_pipeline_as_it_was() -> None:
    pipe = pipeline(boundary=None)  # The second is never called.
    before = pipe.transformer, pipe.transformer_2
    expected = clip(pipe)
    with pytest.raises(CalibrationError, match=r"^transformer_2: calibrate returned without calling the model"):
        fxquant.compile_pipeline(pipe, recipe="rtn-w8a8", calibrate=lambda: clip(pipe), measure=0)
    assert (pipe.transformer, pipe.transformer_2) == before
    assert torch.equal(clip(pipe), expected)
    pipe.transformer = fxquant.compile(pipe.transformer, recipe="rtn-w8a8", calibrate=lambda: clip(pipe), measure=0)
    with pytest.raises(AlreadyCompiledError, match=r"^transformer: this model was made by fxquant"):
        fxquant.compile_pipeline(pipe, recipe="rtn-w8a8", calibrate=lambda: clip(pipe), measure=0)


def test_options_and_names() -> None:
    pipe = pipeline()
    for option in ("plan", "statistics", "resume"):
        with pytest.raises(ConfigurationError, match=f"{option} belongs to one model"):
            fxquant.compile_pipeline(pipe, recipe="rtn-w8a8", calibrate=lambda: None, **{option: None})
    with pytest.raises(ConfigurationError, match="this WanPipeline has no prior or decoder; name its models"):
        fxquant.compile_pipeline(pipe, recipe="rtn-w8a8", calibrate=lambda: None, components=("prior", "decoder"))


def test_one_quantized_transformer_in_two_pipelines() -> None:
    """Pipelines made with ``from_pipe`` share it, and each call fits the same graphs."""
    pipe = pipeline(second=False, boundary=None)
    fxquant.compile_pipeline(pipe, recipe="rtn-w8a8", calibrate=lambda: clip(pipe), measure=0)
    other = WanPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    assert other.transformer is pipe.transformer
    assert torch.equal(clip(other), clip(pipe))
    assert len(pipe.transformer.graphs) == 1
