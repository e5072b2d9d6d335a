"""In float64, where nothing is rounded, a balanced and shifted model with a LoRA is the float model with that LoRA."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxquant
from fxquant.adapters.branches import Site
from fxquant.runtime.lora import adapters_of
from fxquant.runtime.model import GraphModel
from tests import test_two_kinds_of_call as two
from tests.adapters.loras import composed, lora, relative, without_rounding
from tests.zoo.models import ENTRIES

RECIPES = ["htg-w8a8", "ptq4dit-w8a8", "smoothquant-w8a8"]
ROTATED = (
    "remove-no-ops,assign-precision{precision=w8a8} ; balance-channels,absorb-affines,rotate-channels{least=4},"
    "split-low-rank{rank=2},quantize-linears"
)
MODELS = ["DiT2D", "PixArt2D-Sigma", "SD32D", "Flux2D"]


def sites(quantized: GraphModel) -> list[Site]:
    adapters = adapters_of(quantized)
    assert adapters is not None and adapters.branching is not None
    return [*adapters.branching.sites.values()]


@torch.no_grad()
def output(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    leaves = pytree.tree_leaves(model(**inputs))
    return torch.cat([leaf.flatten() for leaf in leaves if isinstance(leaf, Tensor)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        pytest.param(
            name,
            recipe,
            marks=[pytest.mark.exhaustive] * (recipe != RECIPES[0] and name != MODELS[0]),
            id=f"{name}-{'rotated' if recipe == ROTATED else recipe}",
        )
        for name in MODELS
        for recipe in (*RECIPES, ROTATED)
    ],
)
def test_a_lora_acts_on_the_coordinates_of_the_original_model(name: str, recipe: str) -> None:
    entry = next(entry for entry in ENTRIES if entry.id == name)
    model = entry.model(torch.float64)

    def calls(seed: int) -> dict[str, Any]:
        return entry.call(batch=2, seed=seed, dtype=torch.float64)

    def calibrate() -> None:
        for seed in (0, 1):
            output(model, calls(seed))

    quantized = fxquant.compile(model, recipe=without_rounding(recipe), calibrate=calibrate, measure=0)
    adapter = lora(model, rank=3, targets=None, size=0.2)
    expected, plain = output(composed(model, adapter), calls(5)), output(model, calls(5))
    assert relative(plain, expected) > 0.1
    quantized.load_lora_adapter(adapter, adapter_name="a")
    assert relative(output(quantized, calls(5)), expected) < 1e-12
    changes = [site.change for site in sites(quantized)]
    assert len(changes) == len(adapter) / 2
    assert any(change.columns.numel() > 1 for change in changes)
    assert any(change.rows.numel() > 1 for change in changes)
    assert any(change.shift is not None for change in changes) == recipe.startswith("htg")
    assert any(change.turned is not None for change in changes) == (recipe == ROTATED)
    assert any(change.rows_turned is not None for change in changes) == (recipe == ROTATED)


def fused(model: nn.Module, adapter: dict[str, Tensor]) -> nn.Module:
    """The model with the LoRA in its weights."""
    made = copy.deepcopy(model)
    for path, module in made.named_modules():
        if f"transformer.{path}.lora_A.weight" in adapter and isinstance(module, nn.Linear):
            a, b = (adapter[f"transformer.{path}.lora_{part}.weight"].double() for part in "AB")
            module.weight.data += b @ a
    return made


KINDS = [case for case in two.CASES if case[0] != "layer"]
SAMPLE = [
    ("norm", "pe", "balanced"),  # Two graphs with tensors of their own.
    ("modulated", "p", "balanced"),  # A further graph corrects what a stored weight holds.
    ("norm", "p", "shifted by timestep"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "order", "recipe"),
    [pytest.param(*case, marks=[pytest.mark.exhaustive] * (case not in SAMPLE)) for case in KINDS],
)
def test_every_kind_of_call_has_the_lora(kind: str, order: str, recipe: str) -> None:
    """Also kinds that are captured while the LoRA is loaded, and those that were captured before."""
    model = two.Two(kind)
    made = two.compiled(model, fxquant.Recipe.parse(two.RECIPES[recipe]), order)
    later = "e" if order == "p" else "p"
    calls = [calls for calls in (order, later) if (kind, order, recipe, calls) not in two.REFUSED]
    adapter = {key: value for key, value in lora(model, targets=None, size=0.3).items() if "late" not in key}
    expected = fused(model, adapter)
    assert two.error(expected, model, "p") > 0.1
    made.load_lora_adapter(adapter, adapter_name="a")
    for calls_of in "".join(calls):
        assert two.error(made, expected, calls_of) < 1e-12
    made.unload_lora()
    for calls_of in "".join(calls):
        assert two.error(made, model, calls_of) < 1e-12


def test_a_corrected_weight_is_noted() -> None:
    """The sample above has a graph that reads a weight with a factor, which a channel_affine behind it corrects."""
    model = two.Two("modulated")
    made = two.compiled(model, fxquant.Recipe.parse(two.BALANCE), "p")
    made.load_lora_adapter(lora(model, targets=("ada",), size=0.3), adapter_name="a")
    two.error(made, model, "e")
    adapters = adapters_of(made)
    assert adapters is not None and len(adapters.captured) == 2
    assert any("correction" in str(node.target) for node in adapters.captured[1].module.graph.nodes)


@pytest.mark.exhaustive
def test_a_weight_that_a_model_reads_itself_has_the_lora_as_after_fusing() -> None:
    """The pooler of HunyuanDiT reads the weights of its linears without calling them, so peft adds nothing there."""
    entry = next(entry for entry in ENTRIES if entry.id == "HunyuanDiT2D")
    model, call = entry.model(torch.float64), entry.call(seed=5, dtype=torch.float64)
    quantized = fxquant.compile(
        model,
        recipe=without_rounding("smoothquant-w8a8"),
        calibrate=lambda: output(model, entry.call(dtype=torch.float64)),
        measure=0,
    )
    adapter = lora(
        model, rank=3, targets=("pooler.q_proj", "pooler.k_proj", "pooler.v_proj", "pooler.c_proj"), size=0.5
    )
    quantized.load_lora_adapter(adapter, adapter_name="a")
    expected = output(fused(model, adapter), call)
    effect = relative(output(model, call), expected)
    assert effect > 1e-4
    assert relative(output(quantized, call), expected) < 1e-2 * effect  # Parts of the model compute in float32.
    assert torch.equal(output(composed(model, adapter), call), output(model, call))
