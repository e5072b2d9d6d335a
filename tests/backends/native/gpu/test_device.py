"""Models on a GPU: the oracle's results, no waiting for the device, CUDA graphs, and `torch.compile`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fxquant
from fxquant.backends.native import Native
from fxquant.numerics.sqnr import sqnr_db
from fxquant.pipeline.recipes import make_recipe
from fxquant.runtime.model import GraphModel
from fxquant.testing import own_recipes
from tests.tiny import calibrate, inputs, make_dit

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

RECIPES = ["rtn-w8a8", "htg-w8a8", "ptq4dit-w4a8", "dynamic-w8a8", "rtn-w4a16"]


def on_gpu(call: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cuda() if isinstance(value, Tensor) else value for name, value in call.items()}


def compiled(recipe: str, **options: Any) -> GraphModel:
    """Calibrated on the processor, loaded for the GPU through its plan."""
    model = make_dit()
    plan = fxquant.compile(model, recipe=recipe, backend="fake-quant", calibrate=calibrate(model), measure=0).plan
    return fxquant.compile(model.cuda(), plan=plan, backend=Native(**options))


def mixed() -> dict[str, Any]:
    """A call of five samples at five timesteps."""
    return on_gpu(inputs(5, timestep=None, seed=6) | {"timestep": torch.tensor([999, 700, 500, 300, 0])})


@torch.no_grad()
@pytest.mark.parametrize("recipe", [f"{name}-{bits}" for name in own_recipes() for bits in ("w8a8", "w4a8")])
def test_every_recipe_is_the_oracle(recipe: str, tmp_path: Path) -> None:
    made = make_recipe(recipe)
    if any(step.name == "reconstruct-blocks" for step in made.convert):
        made = made.with_options("reconstruct-blocks", iterations=3)
    model = make_dit()
    oracle = fxquant.compile(model, recipe=made, backend="fake-quant", calibrate=calibrate(model), measure=0)
    fxquant.save(oracle, tmp_path / "model")
    ours = fxquant.load(tmp_path / "model", backend="native", device="cuda")
    for call in (mixed(), on_gpu(inputs(1, seed=2)), on_gpu(inputs(4, timestep=100, seed=3))):
        right = oracle(**{name: value.cpu() if isinstance(value, Tensor) else value for name, value in call.items()})
        assert sqnr_db(right.sample, ours(**call).sample.cpu()) > 45.0


@torch.no_grad()
@pytest.mark.parametrize("recipe", [*RECIPES, "rtn-wfp8afp8", "rtn-dynamic-wfp8afp8"])
def test_a_forward_does_not_wait_for_the_device(recipe: str) -> None:
    model, call = compiled(recipe), mixed()
    eager = model(**call).sample  # Compiles the kernels.
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = model(**call).sample
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(again, eager)


@torch.no_grad()
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_captured_graph_replays(recipe: str) -> None:
    model, call = compiled(recipe), mixed()
    for _ in range(3):
        model(**call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = model(**call).sample
    other = on_gpu(inputs(5, timestep=None, seed=7))
    for name, value in other.items():
        if isinstance(value, Tensor):
            call[name].copy_(value)
    captured.fill_(float("nan"))
    graph.replay()
    assert torch.equal(captured, model(**call).sample)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_compiles_at_its_most_thorough(recipe: str) -> None:
    model, call = compiled(recipe), mixed()
    fast = torch.compile(model, mode="max-autotune", fullgraph=True)
    for _ in range(3):  # The third replays a CUDA graph.
        found = fast(**call).sample.clone()
    assert sqnr_db(model(**call).sample.cpu(), found.cpu()) > 45.0
