"""A module that graphs of one model use differently often."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.errors import CalibrationError
from tests.support import relative_error


class Model(nn.Module):
    """A shared embedding for the sample, and for references before and after it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(4, 8)})])
        self.blocks = nn.ModuleList([nn.ModuleDict({"norm": nn.LayerNorm(8), "up": nn.Linear(8, 8)})])
        self.out = nn.Linear(8, 4)

    def forward(
        self, sample: Tensor, timestep: Tensor, before: Tensor | None = None, after: Tensor | None = None
    ) -> Tensor:
        parts = [part for part in (before, sample, after) if part is not None]
        h = torch.cat([self.embed[0]["proj"](part) for part in parts], dim=1)
        h = h + torch.sin(timestep.float())[:, None, None]
        for block in self.blocks:
            h = h + F.gelu(block["up"](block["norm"](h)))
        return self.out(h)


NAME = "embed.0.proj"


def draw(seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(seed)) * scale


def call(seed: int = 0, **references: float) -> dict[str, Tensor]:
    given = {name: draw(50 + seed, scale) for name, scale in references.items()}
    return {"sample": draw(seed), "timestep": torch.tensor([5, 900]), **given}


def compiled(
    model: nn.Module, *kinds: dict[str, float], recipe: str = "rtn-w8a8", **options: Any
) -> fxquant.GraphModel:
    def calibrate() -> None:
        for kind in kinds:
            for seed in range(4):
                model(**call(seed, **kind))

    return fxquant.compile(model, recipe=recipe, calibrate=calibrate, measure=0, **options)


def error(quantized: nn.Module, model: nn.Module, **kind: float) -> float:
    with torch.no_grad():
        return relative_error([quantized(**call(2, **kind))], [model(**call(2, **kind))])


SMALL, BOTH = {"before": 0.02}, {"before": 0.02, "after": 0.3}


def test_uses_keep_their_own_ranges_where_all_calls_have_as_many() -> None:
    model = Model().eval()
    quantized = compiled(model, SMALL, {"after": 0.02})
    ranges = [quantized.plan.layers[name].activation for name in (NAME, f"{NAME}@2")]
    assert ranges[0] is not None
    assert ranges[1] is not None
    quantized = compiled(model, SMALL)
    low, high = (quantized.plan.layers[name].activation for name in (NAME, f"{NAME}@2"))
    assert low.high < 0.1 < high.high


@pytest.mark.parametrize("recipe", ["rtn-w8a8", "rtn-w8a16", "dynamic-w8a8", "htg-w8a8", "ptq4dit-w8a8"])
def test_a_call_that_uses_it_less_often_takes_a_range_that_covers_all(recipe: str) -> None:
    model = Model().eval()
    quantized = compiled(model, SMALL, recipe=recipe)
    bound = 3 * error(quantized, model, **SMALL) + 1e-3
    assert error(quantized, model) < bound
    assert error(quantized, model, **SMALL) < bound


@pytest.mark.parametrize(
    ("recipe", "kinds"),
    [
        ("rtn-w8a8", ({}, SMALL)),
        ("rtn-w8a8", (BOTH, SMALL, {})),
        ("ptq4dit-gptq-w8a8", (SMALL, {})),
        ("htg-w8a8", (SMALL, {})),
    ],
)
def test_calls_of_several_numbers_share_one_range(
    kinds: tuple[dict[str, float], ...], recipe: str, tmp_path: Path
) -> None:
    model = Model().eval()
    quantized = compiled(model, *kinds, recipe=recipe, layers="all")
    uses = [layer for name, layer in quantized.plan.layers.items() if name.startswith(NAME)]
    assert len(uses) == 1 + max(map(len, kinds))
    assert {use.observed for use in uses} == {f"{NAME}@all"}
    fxquant.save(quantized, tmp_path / "q")
    loaded = fxquant.load(tmp_path / "q", model=Model().eval())
    for kind in (*kinds, {"after": 0.3}):
        assert error(quantized, model, **kind) < 0.05
        with torch.no_grad():
            assert torch.equal(loaded(**call(3, **kind)), quantized(**call(3, **kind)))


def test_a_call_that_uses_it_more_often_is_refused_by_name() -> None:
    quantized = compiled(Model().eval(), SMALL)
    with pytest.raises(CalibrationError, match=r"uses 'embed.0.proj' 3 times, the calls of the calibration twice"):
        quantized(**call(**BOTH))


def test_float_activations_need_no_range_for_further_uses() -> None:
    model = Model().eval()
    quantized = compiled(model, SMALL, recipe="rtn-w8a16")
    assert error(quantized, model, **BOTH) < 0.05
