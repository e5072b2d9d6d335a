"""What pipelines give a transformer beside latents, prompts and timesteps: residuals, image prompts, options."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.runtime.model import GraphModel
from tests.zoo.models import ENTRIES, Entry

FLUX = next(entry for entry in ENTRIES if entry.name == "FluxTransformer2DModel")
SD3 = next(entry for entry in ENTRIES if entry.name == "SD3Transformer2DModel")

Change = Callable[[dict[str, Any]], dict[str, Any]]


@torch.no_grad()
def run(model: nn.Module, call: dict[str, Any]) -> Tensor:
    """The first tensor of the output. Some models remove entries of the dicts that they get, so these are copied."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = {name: dict(value) if isinstance(value, dict) else value for name, value in call.items()}
        output: Tensor = model(**given, return_dict=False)[0]
    return output


def made(entry: Entry, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = getattr(diffusers, entry.name)(**{**entry.config, **config}).eval()
    return model


def quantized(model: nn.Module, *calls: dict[str, Any]) -> GraphModel:
    return fxquant.compile(model, recipe="rtn-w8a8", calibrate=lambda: [run(model, call) for call in calls], measure=0)


def error(made: Tensor, expected: Tensor) -> float:
    return float((made - expected).norm() / expected.norm())


def residuals(shape: tuple[int, ...], count: int, seed: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def flux_controlnet(call: dict[str, Any]) -> dict[str, Any]:
    shape = (*call["hidden_states"].shape[:2], 16)
    return {
        **call,
        "controlnet_block_samples": residuals(shape, 2),
        "controlnet_single_block_samples": residuals(shape, 1),
    }


def sd3_controlnet(call: dict[str, Any]) -> dict[str, Any]:
    tokens = (call["hidden_states"].shape[-1] // 2) ** 2
    return {**call, "block_controlnet_hidden_states": residuals((call["hidden_states"].shape[0], tokens, 16), 1)}


def options(call: dict[str, Any]) -> dict[str, Any]:
    return {**call, "joint_attention_kwargs": {}}


def plain(call: dict[str, Any]) -> dict[str, Any]:
    return call


KINDS = {
    "FLUX with a ControlNet": (FLUX, flux_controlnet),
    "FLUX with options of attention": (FLUX, options),
    "SD3 with a ControlNet": (SD3, sd3_controlnet),
    "SD3 with options of attention": (SD3, options),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.exhaustive] * (kind != "SD3 with a ControlNet")) for kind in KINDS]
)
def test_a_second_kind_of_call(kind: str) -> None:
    """A model that was calibrated without them takes them in a graph of their own, and the other way round."""
    entry, change = KINDS[kind]
    model = made(entry)
    traced = fxquant.trace(model)
    for seed in range(2):
        for variant in (plain, change):
            call = variant(entry.call(seed=seed))
            assert torch.equal(run(traced, call), run(model, call))
    first, second = plain(entry.call(seed=0)), change(entry.call(seed=1))
    ours = quantized(model, first)
    for call in (second, first):
        assert error(run(ours, call), run(model, call)) < 0.03
    assert [len(ours.graphs), len(traced.graphs)] == [2, 2]


@pytest.mark.slow
def test_a_controlnet_may_give_residuals_of_every_step() -> None:
    """Calls of both kinds in one calibration: their layers share statistics, and further batches share the graphs."""
    model = made(FLUX)
    calls = [plain(FLUX.call(seed=0)), flux_controlnet(FLUX.call(seed=1))]
    ours = quantized(model, *calls)
    assert ours.plan is not None and len(ours.plan.calls) == 2
    for batch in (1, 3):
        for variant in (plain, flux_controlnet):
            call = variant(FLUX.call(batch=batch, seed=5))
            assert error(run(ours, call), run(model, call)) < 0.03
    assert len(ours.graphs) == 2


def test_a_controlnet_changes_what_the_quantized_model_computes() -> None:
    model = made(SD3)
    ours = quantized(model, sd3_controlnet(SD3.call()))
    call = sd3_controlnet(SD3.call())
    weaker = {**call, "block_controlnet_hidden_states": [t / 2 for t in call["block_controlnet_hidden_states"]]}
    assert error(run(ours, weaker), run(ours, call)) > 0.01
    assert error(run(ours, weaker), run(model, weaker)) < 0.03


@pytest.mark.slow
def test_flux_without_guidance() -> None:
    model = made(FLUX, guidance_embeds=False)
    call = {**FLUX.call(), "guidance": None}
    ours = quantized(model, call)
    assert error(run(ours, call), run(model, call)) < 0.03


def image_prompt(model: Any) -> dict[str, Any]:
    """Weights of an IP-Adapter with four tokens per image, for images of 8 features."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    width, text = model.inner_dim, model.config.joint_attention_dim
    layers: dict[str, Tensor] = {}
    for number in range(len(model.transformer_blocks)):
        for name in ("to_k_ip", "to_v_ip"):
            layers[f"{number}.{name}.weight"], layers[f"{number}.{name}.bias"] = normal(width, text), normal(width)
    projection = {
        "proj.weight": normal(4 * text, 8),
        "proj.bias": normal(4 * text),
        "norm.weight": torch.ones(text),
        "norm.bias": torch.zeros(text),
    }
    return {"image_proj": projection, "ip_adapter": layers}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::fxquant.errors.PortabilityWarning")
def test_an_ip_adapter_that_was_loaded_before() -> None:
    model: Any = made(FLUX)
    model._load_ip_adapter_weights([image_prompt(model)], low_cpu_mem_usage=False)
    model.eval()
    calls = []
    for seed in range(2):
        image = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(seed))
        options = {"ip_adapter_image_embeds": [image]}
        calls.append({**FLUX.call(batch=2, seed=seed), "joint_attention_kwargs": options})
    traced, ours = fxquant.trace(model), quantized(model, *calls)
    for call in calls:
        expected = run(model, call)
        assert torch.equal(run(traced, call), expected)
        assert error(run(ours, call), expected) < 0.03
    other = {**calls[0], "joint_attention_kwargs": calls[1]["joint_attention_kwargs"]}
    assert error(run(ours, other), run(ours, calls[0])) > 1e-3
    assert ours.plan is not None
    assert any("to_k_ip" in name for name in ours.plan.layers)


@pytest.mark.slow
def test_checkpointing_of_gradients_changes_nothing() -> None:
    model: Any = made(SD3)
    model.enable_gradient_checkpointing()
    call = SD3.call()
    assert torch.equal(run(fxquant.trace(model), call), run(model, call))
    ours = quantized(model, call)
    assert ours.is_gradient_checkpointing
