"""What pipelines do between the calls of a quantized transformer: callbacks, guidance, options, interrupts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from diffusers.callbacks import SD3CFGCutoffCallback
from torch import Tensor

import fxquant
from fxquant.errors import DropInError
from tests.adapters.fluxes import MODEL, PROMPT, make_pipe
from tests.adapters.loras import relative
from tests.zoo.models import ENTRIES

SD3 = next(entry for entry in ENTRIES if entry.id == "SD32D")
STEPS = 4


def sd3_pipe() -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, latent_channels=4).eval()
    names = [f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")]
    pipe = StableDiffusion3Pipeline(SD3.model(), FlowMatchEulerDiscreteScheduler(), vae, **dict.fromkeys(names))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _embeds(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "prompt_embeds": torch.randn(1, 5, 12, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, 10, generator=generator),
    }


def sd3_call(**options: Any) -> dict[str, Any]:
    """Arguments of a call with classifier-free guidance."""
    negative = {f"negative_{name}": tensor for name, tensor in _embeds(1).items()}
    size = {"height": 8, "width": 8, "output_type": "latent", "num_inference_steps": STEPS}
    return {**_embeds(0), **negative, **size, "guidance_scale": 5.0, **options}


def flux_call(**options: Any) -> dict[str, Any]:
    return {**PROMPT, "num_inference_steps": STEPS, **options}


def run(pipe: DiffusionPipeline, call: dict[str, Any]) -> Tensor:
    """Latents; the same noise each time."""
    latents: Tensor = pipe(**call, generator=torch.Generator().manual_seed(1)).images
    return latents


Pair = tuple[DiffusionPipeline, DiffusionPipeline]


def both(make: Callable[[], DiffusionPipeline], call: dict[str, Any]) -> Pair:
    """A float pipeline, and one with its transformer quantized."""
    float_pipe, pipe = make(), make()
    fxquant.compile_pipeline(pipe, recipe="rtn-w8a16", calibrate=lambda: run(pipe, call), measure=0)
    return float_pipe, pipe


@pytest.fixture(scope="module")
def sd3() -> Pair:
    return both(sd3_pipe, sd3_call())


@pytest.fixture(scope="module")
def flux() -> Pair:
    return both(lambda: make_pipe(MODEL), flux_call())


def check_follows(pair: Pair, plain: dict[str, Any], changed: dict[str, Any]) -> None:
    """Check that an option changes the images of the quantized model as it changes those of the float model."""
    of_float, of_quantized = (run(pipe, changed) - run(pipe, plain) for pipe in pair)
    assert relative(of_float, run(pair[0], plain)) > 0.001
    assert relative(of_quantized, of_float) < 0.2


# --- callbacks ---


def halve_latents(_: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"latents": tensors["latents"] * 0.5} if step == 1 else tensors


def other_prompt(_: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"prompt_embeds": -5 * tensors["prompt_embeds"]} if step == 1 else tensors


def stronger_guidance(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    pipe._guidance_scale = 5.0 + 5.0 * step
    return tensors


@pytest.mark.slow
@pytest.mark.parametrize("change", [halve_latents, other_prompt, stronger_guidance], ids=lambda change: change.__name__)
def test_what_a_callback_changes_reaches_the_model(sd3: Pair, change: Any) -> None:
    names = ["latents", "prompt_embeds"]
    options = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": names}
    check_follows(sd3, sd3_call(), sd3_call(**options))


@pytest.mark.parametrize("change", [halve_latents, other_prompt], ids=lambda change: change.__name__)
def test_callbacks_of_flux(flux: Pair, change: Any) -> None:
    names = ["latents", "prompt_embeds"]
    options = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": names}
    check_follows(flux, flux_call(), flux_call(**options))


def test_a_callback_that_ends_guidance_halves_the_batch(sd3: Pair) -> None:
    """From then on the model is called with one sample in place of two, which the same graph serves."""
    graphs = len(sd3[1].transformer.graphs)
    cutoff = SD3CFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    check_follows(sd3, sd3_call(), sd3_call(callback_on_step_end=cutoff))
    assert len(sd3[1].transformer.graphs) == graphs


def test_a_callback_reads_the_model(flux: Pair) -> None:
    seen = []

    def look(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((pipe.transformer.config.guidance_embeds, pipe.transformer.dtype, pipe.transformer.device.type))
        return tensors

    run(flux[1], flux_call(callback_on_step_end=look))
    assert seen == [(MODEL.config.guidance_embeds, torch.float32, "cpu")] * STEPS


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_an_interrupted_run_calls_the_model_no_more(name: str, request: pytest.FixtureRequest) -> None:
    _, pipe = request.getfixturevalue(name)
    call = {"sd3": sd3_call, "flux": flux_call}[name]
    calls: list[Any] = []
    after: list[Tensor] = []

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        after.append(tensors["latents"].clone())
        pipe._interrupt = step == 1
        return tensors

    hook = pipe.transformer.register_forward_hook(lambda *given: calls.append(given))
    latents = run(pipe, call(callback_on_step_end=stop))
    assert len(calls) == len(after) == 2
    assert torch.equal(latents, after[-1])
    calls.clear()
    whole = run(pipe, call())
    hook.remove()
    assert len(calls) == STEPS
    assert not torch.equal(whole, latents)


# --- options of a call ---


def test_the_strength_of_loras_that_there_are_not_changes_nothing(flux: Pair) -> None:
    """Nor is each strength a kind of call, for which a graph would be captured."""
    _, pipe = flux
    expected, graphs = run(pipe, flux_call()), len(pipe.transformer.graphs)
    for scale in (1.0, 0.5, 0.25):
        assert torch.equal(run(pipe, flux_call(joint_attention_kwargs={"scale": scale})), expected)
    assert len(pipe.transformer.graphs) == graphs


def test_guidance_that_skips_layers_is_a_kind_of_call(sd3: Pair) -> None:
    """Its calls leave out blocks, so they get a graph of their own, which shares the tensors."""
    options = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    transformer = sd3[1].transformer
    before, graphs = transformer.get_memory_footprint(), len(transformer.graphs)
    check_follows(sd3, sd3_call(), sd3_call(**options))
    assert len(transformer.graphs) == graphs + 1
    assert transformer.get_memory_footprint() == before
    run(sd3[1], sd3_call(**options))
    assert len(transformer.graphs) == graphs + 1


def test_guidance_of_flux_with_a_negative_prompt(flux: Pair) -> None:
    """Two calls per step, each with its own context of caches."""
    generator = torch.Generator().manual_seed(5)
    negative = {
        "negative_prompt_embeds": torch.randn(PROMPT["prompt_embeds"].shape, generator=generator),
        "negative_pooled_prompt_embeds": torch.randn(PROMPT["pooled_prompt_embeds"].shape, generator=generator),
    }
    check_follows(flux, flux_call(), flux_call(true_cfg_scale=4.0, **negative))


# --- several devices ---


def test_parallelism_is_refused_by_name(flux: Pair) -> None:
    from diffusers import ContextParallelConfig

    expected = run(flux[1], flux_call())
    with pytest.raises(DropInError, match=r"enable_parallelism: a graph runs on one device.*fxquant.parallelize"):
        flux[1].transformer.enable_parallelism(config=ContextParallelConfig(ring_degree=2))
    assert torch.equal(run(flux[1], flux_call()), expected)
