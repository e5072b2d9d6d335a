"""Code that walks over the modules of a quantized model sees those of the original, and changes none in silence."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import hooks
from torch import nn

import fxquant
from fxquant.errors import ConfigurationError, DropInError
from fxquant.runtime.model import GraphModel
from tests.tiny import calibrate, make_dit, run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> Any:
    return make_dit(layers=2)


@pytest.fixture(scope="module")
def quantized(model: Any) -> GraphModel:
    return fxquant.compile(model, recipe="rtn-w8a8", calibrate=calibrate(model), measure=0)


def replace(modules: list[nn.Module], name: str, value: Any) -> None:
    for module in modules:
        setattr(module, name, value)


@pytest.mark.parametrize("by_name", [False, True])
def test_other_quantizers_are_refused(quantized: GraphModel, by_name: bool) -> None:
    """They replace linears, of which a graph has none, and would do nothing and say nothing."""
    quantization = pytest.importorskip("torchao.quantization")
    config = quantization.Int8WeightOnlyConfig()
    options = {"filter_fn": None} if by_name else {}
    config = quantization.FqnToConfig({"proj_out_2": config}) if by_name else config
    before = run(quantized)
    with pytest.raises(ConfigurationError, match=r"torchao \(quantize_|torchao \(_replace"):
        quantization.quantize_(quantized, config, **options)
    assert torch.equal(run(quantized), before)


ATTACH: dict[str, Callable[[Any], Any]] = {
    "layerwise_casting": lambda model: hooks.apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32),
    "group_offloading, blocks": lambda model: hooks.apply_group_offloading(
        model, CPU, CPU, "block_level", num_blocks_per_group=1
    ),
    "group_offloading, leaves": lambda model: hooks.apply_group_offloading(model, CPU, CPU, "leaf_level"),
    "first_block_cache": lambda model: hooks.apply_first_block_cache(model, hooks.FirstBlockCacheConfig()),
    "faster_cache": lambda model: hooks.apply_faster_cache(
        model, hooks.FasterCacheConfig(current_timestep_callback=lambda: 5, attention_weight_callback=lambda _: 0.5)
    ),
    "pyramid_attention_broadcast": lambda model: hooks.apply_pyramid_attention_broadcast(
        model,
        hooks.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 5
        ),
    ),
    "taylorseer_cache": lambda model: hooks.apply_taylorseer_cache(
        model, hooks.TaylorSeerCacheConfig(cache_identifiers=[r"transformer_blocks\.\d+\.attn1"])
    ),
    "mag_cache": lambda model: hooks.apply_mag_cache(
        model, hooks.MagCacheConfig(mag_ratios=[1.0] * 4, num_inference_steps=4)
    ),
    "layer_skip": lambda model: hooks.apply_layer_skip(model, hooks.LayerSkipConfig(indices=[0])),
    "hooks of torch": lambda model: [each.register_forward_hook(print) for each in model.children()],
    "another forward": lambda model: replace([*model.children()], "forward", print),
    "another module": lambda model: replace([*model.children()][:1], "proj", nn.Identity()),
    "casting by hand": lambda model: [each.half() for each in model.children()],
}


@pytest.mark.parametrize("what", ATTACH)
def test_what_walks_over_modules_is_refused(model: Any, quantized: GraphModel, what: str) -> None:
    ATTACH[what](copy.deepcopy(model))  # A float model takes it.
    expected = run(quantized)
    with pytest.raises(
        DropInError, match=r"a captured model has no [\w.]*(_diffusers_hook|forward|proj|half|register_)"
    ):
        ATTACH[what](quantized)
    assert torch.equal(run(quantized), expected)
    assert not any("_diffusers_hook" in vars(module) for module in quantized.modules())


def test_views_have_the_classes_and_names_of_the_original(model: Any, quantized: GraphModel) -> None:
    """Modules without children are only among ``children()``: loaders read the weights of linears in ``modules()``."""
    expected = {name: type(module) for name, module in model.named_modules() if name and [*module.children()]}
    found: dict[str, Any] = {name: module for name, module in quantized.named_modules() if name in expected}
    assert {name: module.__class__ for name, module in found.items()} == expected
    assert all(isinstance(found[name], cls) for name, cls in expected.items())
    assert not any(isinstance(module, nn.Linear) for module in quantized.modules())
    assert [name for name, _ in quantized.named_children()] == [name for name, _ in model.named_children()]
    blocks = found["transformer_blocks"]
    assert len(blocks) == 2 and [each.__class__ for each in blocks] == [blocks[0].__class__] * 2
    assert blocks[0].attn1.heads == model.transformer_blocks[0].attn1.heads
    query = dict(found["transformer_blocks.0.attn1"].named_children())["to_q"]
    assert isinstance(query, nn.Linear) and query.in_features == 16
    with pytest.raises(DropInError, match=r"no transformer_blocks\.0\.attn1\.to_q\.weight"):
        query.weight
    with pytest.raises(DropInError, match=r"no transformer_blocks\.0\.attn1\.to_q\.weight"):
        del query.weight


def test_walks_that_change_nothing_work(quantized: GraphModel) -> None:
    quantized.eval().requires_grad_(False).apply(lambda module: None)
    assert not any(module.training for module in quantized.modules())
    names = [name for name, _ in quantized.named_parameters()] + [name for name, _ in quantized.named_buffers()]
    assert names and all(name.startswith("graphs.") for name in names)
    assert {*map(id, quantized.buffers())} == {id(tensor) for tensor in quantized.tensors().values()} - {
        id(tensor) for tensor in quantized.parameters()
    }
    held = nn.ModuleDict({"transformer": quantized})
    assert {f"transformer.{name}" for name in names} == {
        name for name, _ in (*held.named_parameters(), *held.named_buffers())
    }
    assert len({*held.modules()}) == len([*held.modules()])
    assert [*map(id, quantized.modules())] == [*map(id, quantized.modules())]
