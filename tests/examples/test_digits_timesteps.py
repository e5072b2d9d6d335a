"""The shipped pipeline at run time: one graph for every schedule, and for samples at different timesteps."""

from __future__ import annotations

import functools

import pytest
import torch
from diffusers import DiTPipeline
from torch import Tensor

import fxquant
from examples.digits import compare, generate
from fxquant.runtime.model import GraphModel

RECIPES = pytest.mark.parametrize("recipe", ["htg-w8a8", "rtn-w8a8"])


@pytest.fixture(scope="module")
def quantized(pipe: DiTPipeline) -> functools._lru_cache_wrapper[GraphModel]:
    @functools.cache
    def make(recipe: str) -> GraphModel:
        return fxquant.compile(
            pipe.transformer, recipe=recipe, calibrate=lambda: generate(pipe, [3, 1, 4], steps=10), measure=0
        )

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "numbers"),
    [
        ("htg-w8a8", (10, 50)),
        pytest.param("htg-w8a8", (10, 50, 250), marks=pytest.mark.exhaustive),
        ("rtn-w8a8", (10,)),
        pytest.param("rtn-w8a8", (10, 50, 250), marks=pytest.mark.exhaustive),
    ],
)
def test_one_graph_serves_all_numbers_of_steps(
    pipe: DiTPipeline, quantized, recipe: str, numbers: tuple[int, ...]
) -> None:
    model = quantized(recipe)
    calls: list[float] = []
    hook = model.graphs[0].register_forward_pre_hook(lambda _, args: calls.append(float(args[1].flatten()[0])))
    try:
        with compare.transformer_of(pipe, model):
            for steps in numbers:
                calls.clear()
                image = generate(pipe, [7], steps=steps)
                assert len(set(calls)) == len(calls) == steps
                assert image.isfinite().all()
                assert image.std() > 0.05
    finally:
        hook.remove()
    assert len(model.captured) == 1


@RECIPES
@torch.no_grad()
def test_a_mixed_batch_is_as_each_sample_alone(quantized, recipe: str) -> None:
    model = quantized(recipe)
    generator = torch.Generator().manual_seed(0)
    call = {
        "hidden_states": torch.randn(5, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([950, 700, 450, 200, 0]),
        "class_labels": torch.tensor([3, 1, 4, 1, 5]),
    }

    def part(number: int) -> dict[str, Tensor]:
        return {name: value[number : number + 1] for name, value in call.items()}

    together = model(**call).sample
    alone = torch.cat([model(**part(number)).sample for number in range(5)])
    # What lies on the edge of two codes may fall to either side, as products of other sizes are summed in other orders.
    assert (together - alone).norm() < 1e-2 * alone.norm()
    same = model(**call | {"timestep": torch.full((5,), 950)}).sample
    assert (together - same)[1:].norm() > 0.1 * alone.norm()
    assert len(model.captured) == 1
