"""Every registered recipe, with every rounding: compiled in one graph, exported, and independent of the batch."""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection

import pytest
import torch
from torch import Tensor

import fxquant
from fxquant.pipeline.recipes import ROUNDINGS, make_recipe
from fxquant.runtime.model import GraphModel
from fxquant.testing import own_recipes
from tests.tiny import calibrate, inputs, make_dit, run

PRECISIONS = ("w8a8", "w4a8-g8")
NAMES = [f"{name}-{bits}" for name in own_recipes() for bits in PRECISIONS]
NAMES += [f"ptq4dit-{rounding}-w4a8-g8" for rounding in ROUNDINGS]  # Other weights, no other graph.
NAMES += ["ptq4dit-dynamic-gptq-w4a8-g8", "htg-w4a16-g8"]

SAMPLE = [f"{name}-{PRECISIONS[number % 2]}" for number, name in enumerate(own_recipes())] + ["htg-w4a16-g8"]
"""Every recipe once: ``make test`` runs mixed batches of these."""

COMPILED = ("auto-w8a8", "htg-w8a8", "svdquant-bins-w8a8", "htg-w4a16-g8")
"""What ``make test`` compiles and exports: ranges by layer and by timestep, bins with branches, and float inputs."""

BOTH = ("rtn", "ptq4dit", "htg", "quarot")
"""Recipes of which ``make test`` compares both precisions, each with other ranges or graphs."""


def every_recipe(sample: Collection[str]) -> pytest.MarkDecorator:
    """Parametrizes a test with all recipes, exhaustive outside of the sample."""
    return pytest.mark.parametrize(
        "recipe",
        [pytest.param(recipe, marks=[] if recipe in sample else pytest.mark.exhaustive) for recipe in NAMES],
    )


@functools.cache
def compiled(recipe: str) -> GraphModel:
    model, made = make_dit(), make_recipe(recipe)
    if any(step.name == "reconstruct-blocks" for step in made.convert):
        made = made.with_options("reconstruct-blocks", iterations=3)
    if any(step.name == "split-low-rank" for step in made.convert):
        made = made.with_options("split-low-rank", rank=2)  # The model is 16 channels wide.
    return fxquant.compile(model, recipe=made, calibrate=calibrate(model), measure=0)


@pytest.mark.slow
@every_recipe(COMPILED)
def test_it_compiles_without_a_graph_break_and_exports(recipe: str) -> None:
    quantized = compiled(recipe)
    call = inputs(timestep=None, seed=5)
    with torch.no_grad():
        expected = quantized(**call).sample
        torch._dynamo.reset()
        made = torch.compile(copy.deepcopy(quantized), backend="aot_eager", fullgraph=True)
        assert torch.equal(made(**call).sample, expected)
        (captured,) = quantized.captured
        tensors = [call[name] for name, _ in captured.call.tensors]
        program = torch.export.export(captured.module, tuple(tensors))
        assert torch.equal(program.module()(*tensors)[0], expected)


@every_recipe(SAMPLE)
def test_a_mixed_batch_is_as_each_sample_alone(recipe: str) -> None:
    quantized = compiled(recipe)
    call = inputs(5, timestep=None, seed=6) | {"timestep": torch.tensor([999, 700, 500, 300, 0])}

    def part(number: int) -> dict[str, Tensor]:
        return {name: value[number : number + 1] for name, value in call.items()}

    with torch.no_grad():
        together = quantized(**call).sample
        alone = [quantized(**part(number)).sample for number in range(5)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)
    assert len(quantized.graphs) == 1


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.exhaustive] * (name not in BOTH)) for name in own_recipes()]
)
def test_fewer_bits_cost_quality_and_none_cost_all_of_it(name: str) -> None:
    reference = run(make_dit(), seed=9)
    errors = [float((run(compiled(f"{name}-{bits}"), seed=9) - reference).norm()) for bits in PRECISIONS]
    assert 0 < errors[0] < errors[1] < float(reference.norm())
