from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

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
            lambda model: accelerate.cpu_offload_with_hook(model, execution_device="cpu"),
            ("moved between devices by accelerate", "enable_model_cpu_offload", "pipe.remove_all_hooks()"),
        ),
        (in_a_row, ("moved between devices by accelerate",)),
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
