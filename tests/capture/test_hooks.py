from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.hooks import (
    HookRegistry,
    ModelHook,
    PyramidAttentionBroadcastConfig,
    apply_group_offloading,
    apply_layerwise_casting,
    apply_pyramid_attention_broadcast,
)
from torch import nn

import fxquant
from fxquant.errors import CaptureError, ConfigurationError
from tests.tiny import calibrate, run

accelerate = pytest.importorskip("accelerate")


def broadcast(model: nn.Module) -> None:
    ranges = {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": (100, 800)}
    options = PyramidAttentionBroadcastConfig(**ranges, current_timestep_callback=lambda: 500)
    apply_pyramid_attention_broadcast(model, options)


def cast(model: nn.Module) -> None:
    apply_layerwise_casting(model, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def offload_groups(model: nn.Module) -> None:
    cpu = torch.device("cpu")
    apply_group_offloading(model, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


def any_hook(model: Any) -> None:
    HookRegistry.check_if_exists_or_initialize(model.transformer_blocks[0]).register_hook(ModelHook(), "of_my_own")


def in_a_row(model: nn.Module) -> None:
    hooks = accelerate.hooks
    accelerate.hooks.add_hook_to_module(model, hooks.SequentialHook(hooks.ModelHook(), hooks.CpuOffload("cpu")))


@pytest.mark.parametrize(
    ("hang", "said"),
    [
        (broadcast, ("transformer_blocks.0.attn1", "pyramid_attention_broadcast", "disable_cache()")),
        (cast, ("transformer_blocks.0.attn1.to_q", "layerwise_casting", "without enable_layerwise_casting()")),
        (offload_groups, ("group_offloading", "without group offloading")),
        (any_hook, ("transformer_blocks.0", "of_my_own", "load the model again without it")),
        (
            lambda model: accelerate.cpu_offload(model, execution_device="cpu"),
            ("pos_embed", "offloaded by accelerate", "enable_sequential_cpu_offload", "pipe.remove_all_hooks()"),
        ),
        (
            in_a_row,
            ("moved between devices by accelerate", "enable_model_cpu_offload", "pipe.remove_all_hooks()"),
        ),
    ],
)
def test_hooks_that_a_graph_cannot_have(
    tiny_dit: DiTTransformer2DModel, hang: Callable[[nn.Module], Any], said: tuple[str, ...]
) -> None:
    hang(tiny_dit)
    for function in (
        lambda: fxquant.compile(tiny_dit, recipe="rtn-w8a8", calibrate=calibrate(tiny_dit)),
        lambda: fxquant.trace(tiny_dit),
    ):
        with pytest.raises(ConfigurationError) as caught:
            function()
        assert all(words in str(caught.value) for words in said), str(caught.value)


def test_a_model_that_is_moved_as_a_whole_is_not_traced(tiny_dit: DiTTransformer2DModel) -> None:
    """``fxquant.compile`` takes it, because the quantized model does not share its weights."""
    accelerate.cpu_offload_with_hook(tiny_dit, execution_device="cpu")
    with pytest.raises(ConfigurationError, match=r"moved between devices by accelerate.*pipe\.remove_all_hooks\(\)"):
        fxquant.trace(tiny_dit)


def test_hooks_that_were_removed_are_no_hindrance(tiny_dit: DiTTransformer2DModel) -> None:
    expected = run(tiny_dit)
    accelerate.cpu_offload(tiny_dit, execution_device="cpu")
    accelerate.hooks.remove_hook_from_module(tiny_dit, recurse=True)  # What pipe.remove_all_hooks() does.
    any_hook(tiny_dit)
    tiny_dit.transformer_blocks[0]._diffusers_hook.remove_hook("of_my_own")
    assert torch.equal(run(fxquant.trace(tiny_dit)), expected)


def test_hooks_that_only_look_for_the_device_of_inputs_are_traced(tiny_dit: DiTTransformer2DModel) -> None:
    expected = run(tiny_dit)
    accelerate.dispatch_model(tiny_dit, {"": "cpu"}, main_device="cpu", force_hooks=True)
    assert torch.equal(run(fxquant.trace(tiny_dit)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("path", [pytest.param("", marks=pytest.mark.exhaustive), "transformer_blocks.0"])
def test_a_function_around_a_forward_that_holds_the_model(tiny_dit: DiTTransformer2DModel, path: str) -> None:
    module = tiny_dit.get_submodule(path)
    inner = module.forward

    @functools.wraps(inner)
    def outer(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    module.forward = outer
    for function in (
        lambda: fxquant.compile(tiny_dit, recipe="rtn-w8a8", calibrate=calibrate(tiny_dit)),
        lambda: run(fxquant.trace(tiny_dit)),
    ):
        with pytest.raises(CaptureError, match=r"keeps a reference to the original module.*types.MethodType"):
            function()


# --- caches of steps ---

CACHES: dict[str, Callable[[], Any]] = {
    "fbc_leader_block_hook": lambda: diffusers.FirstBlockCacheConfig(threshold=0.1),
    "faster_cache_denoiser": lambda: diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        is_guidance_distilled=True,
        attention_weight_callback=lambda _: 0.5,
        current_timestep_callback=lambda: 500,
    ),
    "pyramid_attention_broadcast": lambda: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    ),
    "taylorseer_cache": diffusers.TaylorSeerCacheConfig,
    "mag_cache_leader_block_hook": lambda: diffusers.MagCacheConfig(num_inference_steps=4, mag_ratios=[1.0] * 4),
}


@pytest.fixture
def flux() -> Any:
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=1,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("hook", CACHES)
def test_a_cache_of_steps_is_not_captured(flux: Any, hook: str) -> None:
    """A graph would hold what the cache does in the first step, in every step."""
    flux.enable_cache(CACHES[hook]())
    for function in (
        lambda: fxquant.compile(flux, recipe="rtn-w8a8", calibrate=lambda: pytest.fail("calibrated")),
        lambda: fxquant.trace(flux),
    ):
        with pytest.raises(
            ConfigurationError, match=rf"has the hook '{hook}'.*so that calls differ.*disable_cache\(\)"
        ):
            function()
    flux.disable_cache()
    assert isinstance(fxquant.trace(flux), nn.Module)


# --- hooks of torch ---


def test_hooks_of_the_whole_model_run_once_around_every_call(tiny_dit: DiTTransformer2DModel) -> None:
    """In calibration as in use, also if they change the output; and whoever removes one removes it everywhere."""
    seen: list[float] = []
    plain = run(tiny_dit)
    handle = tiny_dit.register_forward_hook(lambda _, args, output: type(output)(sample=output.sample * 2))
    listening = tiny_dit.register_forward_pre_hook(
        lambda _, args, given: seen.append(float(given["timestep"][0])), with_kwargs=True
    )
    expected, calibrated = run(tiny_dit), []
    assert torch.equal(expected, plain * 2)
    traced = fxquant.trace(tiny_dit)
    assert torch.equal(run(traced), expected)
    seen.clear()
    ours = fxquant.compile(
        tiny_dit,
        recipe="rtn-w8a8",
        calibrate=lambda: calibrated.extend(run(tiny_dit, timestep=step) for step in (500, 100)),
        measure=2,
    )
    assert seen == [500, 100]
    assert torch.allclose(calibrated[0], expected, atol=1e-5)
    assert (run(ours) - expected).norm() / expected.norm() < 0.02
    assert seen == [500, 100, 500]
    handle.remove()
    listening.remove()
    assert (run(ours) - plain).norm() / plain.norm() < 0.02
    assert torch.equal(run(traced), plain)
    assert len(seen) == 3


def test_hooks_of_modules_are_part_of_the_model(tiny_dit: DiTTransformer2DModel) -> None:
    """They are traced with it, so what they compute from other values is computed again in each call."""
    tiny_dit.transformer_blocks[0].attn1.register_forward_hook(lambda _, args, output: output * 3)
    tiny_dit.transformer_blocks[0].ff.register_forward_pre_hook(lambda _, args: (args[0] + 1, *args[1:]))
    assert torch.equal(run(fxquant.trace(tiny_dit)), run(tiny_dit))
    ours = fxquant.compile(tiny_dit, recipe="rtn-w8a8", calibrate=calibrate(tiny_dit), measure=0)
    for seed in range(2):
        expected = run(tiny_dit, seed=seed)
        assert (run(ours, seed=seed) - expected).norm() / expected.norm() < 0.02
