"""Quantized models on two ranks against one process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.pipeline.recipes import make_recipe
from fxquant.testing.models import TINY, calibration, example_call
from tests.distributed.ranks import run_ranks
from tests.parallel import work
from tests.parallel.models import kinds


@dataclass(frozen=True)
class Case:
    """A tiny model, a recipe, and layers whose style is known."""

    model: str
    recipe: str
    styles: dict[str, str]
    options: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    layers: str = "default"
    flips: float = 0.0  # The share of outputs whose codes may be other ones.

    def quantized(self) -> nn.Module:
        recipe = make_recipe(self.recipe, self.layers)
        for name, options in self.options.items():
            recipe = recipe.with_options(name, **options)
        model = TINY[self.model]()
        return fxquant.compile(model, recipe=recipe, calibrate=calibration(model), backend="fake-quant")

    def calls(self) -> list[dict[str, Any]]:
        """One as in calibration, two of other batch sizes, and one of another kind."""
        model = TINY[self.model]()
        calls = [example_call(model, batch=batch, seed=batch, timestep=None) for batch in (2, 1, 3)]
        size = {"size": 16} if self.model == "flux" else {"prompt": 7}
        return calls if self.model == "dit" else [*calls, example_call(model, seed=9, **size)]  # type: ignore[arg-type]


COLUMN, ROW, GATHERED, WHOLE = "column-wise", "row-wise", "column-wise, gathered", "replicated"


def attention(name: str, *outputs: str, added: bool = False) -> dict[str, str]:
    """The styles of an attention that is divided by heads."""
    inputs = ["to_q", "to_k", "to_v", *(("add_q_proj", "add_k_proj", "add_v_proj") if added else ())]
    return {f"{name}.{layer}": COLUMN for layer in inputs} | {f"{name}.{layer}": ROW for layer in outputs}


def feed_forward(name: str) -> dict[str, str]:
    return {f"{name}.net.0.proj": COLUMN, f"{name}.net.2": ROW}


_DIT = attention("transformer_blocks.0.attn1", "to_out.0") | feed_forward("transformer_blocks.0.ff")
_FLUX = {
    **attention("transformer_blocks.0.attn", "to_out.0", "to_add_out", added=True),
    **feed_forward("transformer_blocks.0.ff"), **feed_forward("transformer_blocks.0.ff_context"),
    **attention("single_transformer_blocks.0.attn"),
    "single_transformer_blocks.0.proj_mlp": COLUMN, "single_transformer_blocks.0.proj_out": ROW,
    "single_transformer_blocks.0.norm.linear": GATHERED,
}  # fmt: skip
_PIXART = _DIT | attention("transformer_blocks.0.attn2", "to_out.0")
_SD3 = attention("transformer_blocks.0.attn", "to_out.0", "to_add_out", added=True) | {
    **feed_forward("transformer_blocks.0.ff"), **feed_forward("transformer_blocks.1.ff"),
    "transformer_blocks.0.norm1.linear": GATHERED,
}  # fmt: skip

CASES = {
    "per-token": Case("flux", "dynamic-w8a8", _FLUX, flips=0.01),
    "groups": Case("sd3", "rtn-w4a8-g8", _SD3),
    "branches": Case("dit", "svdquant-w4a4", _DIT, {"split-low-rank": {"rank": 2}}),
}
MORE = {
    "static": Case("dit", "ptq4dit-w8a8", _DIT),
    "timesteps": Case("pixart", "htg-w8a8", _PIXART),
    "rotated": Case("flux", "quarot-w4a4", dict.fromkeys(_FLUX, GATHERED)),  # A rotation mixes channels of all ranks.
    "attention": Case("sd3", "ptq4dit-w8a8", _SD3, layers="all"),
    "float inputs": Case("pixart", "rtn-w4a16", _PIXART),
    "branches of joint attention": Case("flux", "svdquant-w4a4", _FLUX, {"split-low-rank": {"rank": 2}}),
}


def assert_alike(name: str, output: Tensor, wanted: Tensor, flips: float = 0.0) -> None:
    """Outputs are equal but for rounding, and but for a share of them whose codes may be other ones.

    Sums of several ranks are rounded in another order. With ranges found at run time these sums are also the ranges, so
    a code near the middle of two values may become its neighbour, and outputs of its token differ by a part of a step.
    """
    difference = (output - wanted).abs()
    differs = difference > 1e-5 * (1 + wanted.abs())
    assert float(differs.float().mean()) <= flips, (name, float(difference.max()))
    assert float(difference.max()) < 1e-3 * float(wanted.abs().max()), (name, float(difference.max()))


def check(cases: Mapping[str, Case], folder: Path) -> None:
    """Compare every call on two ranks with one process."""
    models = {name: case.quantized() for name, case in cases.items()}
    for name, model in models.items():
        fxquant.save(model, folder / name)
    given = [(str(folder / name), case.calls()) for name, case in cases.items()]
    both = run_ranks(work.outputs_of, 2, given)
    for found in both:
        if isinstance(found, Exception):
            raise found
    for number, (name, case) in enumerate(cases.items()):
        plan = fxquant.tensor_parallel_plan(models[name], 2)
        found = kinds(plan)
        assert case.styles.items() <= found.items(), (name, found)
        for rank in both:
            result = rank[number]
            for output, call in zip(result["outputs"], case.calls(), strict=True):
                with torch.no_grad():
                    wanted = models[name](**call).sample
                assert_alike(name, output, wanted, case.flips)
            assert result["graphs"] == len(models[name].graphs)
            whole, part = result["bytes"]
            assert part == whole / 2  # Of codes; every linear of these models is divided.
            assert "tensor-parallel" in result["errors"]["save"]
            assert "tensor-parallel" in result["errors"]["dtype"]
            assert "tensor-parallel already" in result["errors"]["again"]


@pytest.mark.slow
def test_models_on_two_ranks(tmp_path: Path) -> None:
    check(CASES, tmp_path)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_more_models_on_two_ranks(tmp_path: Path) -> None:
    check(MORE, tmp_path)


@pytest.mark.slow
def test_layers_used_twice_heads_that_do_not_fit_and_refusals() -> None:
    for found in run_ranks(work.edges, 2):
        if isinstance(found, Exception):
            raise found
        for name, (output, wanted) in found["outputs"].items():
            assert_alike(name, output, wanted)
        wanted_messages = {
            "two dimensions": "the mesh has 2 dimensions",
            "one rank": "the mesh has one rank",
            "another device": "the mesh is of cuda and the model is on cpu",
            "nothing divides": "no quantized layer of this model can be divided",
            "other weights": "than rank 0",
            "context parallelism": "the model between devices; load the model again, without enable_parallelism()",
            "another backend": "kernels of backend 'native'",
        }
        assert found["errors"].keys() == wanted_messages.keys()
        for what, text in wanted_messages.items():
            assert text in found["errors"][what], what
