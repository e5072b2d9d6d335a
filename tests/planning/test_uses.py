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
    model: nn.Module, *kinds: dict[str, float], recipe: str | fxquant.Recipe = "rtn-w8a8", **options: Any
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
    with pytest.raises(CalibrationError, match=r"uses 'embed.0.proj' 3 times, but the calibration calls use it twice"):
        quantized(**call(**BOTH))


def test_float_activations_need_no_range_for_further_uses() -> None:
    model = Model().eval()
    quantized = compiled(model, SMALL, recipe="rtn-w8a16")
    assert error(quantized, model, **BOTH) < 0.05


class Attentive(nn.Module):
    """An attention that a reference makes run once more."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([SelfAttention()])
        self.out = nn.Linear(4, 4)

    def forward(self, sample: Tensor, timestep: Tensor, before: Tensor | None = None) -> Tensor:
        h = sample + torch.sin(timestep.float())[:, None, None]
        for more in (0.0, *([] if before is None else [before])):
            h = h + self.blocks[0](h + more)
        return self.out(h)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 8) for _ in range(3))
        self.o = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_an_attention_that_a_call_uses_less_often_is_refused_with_what_to_do() -> None:
    model = Attentive().eval()
    with pytest.raises(CalibrationError) as refused:
        compiled(model, SMALL, layers="all")(**call())
    told = str(refused.value)
    assert "uses the attention 'blocks.0' once, but the calibration calls use it twice, and each use has its" in told
    assert "calibrate with calls of both kinds, or keep it float: assign-precision{overrides=" in told
    overrides = told.partition("overrides=")[2].rstrip("}")
    advised = fxquant.make_recipe("rtn-w8a8", "all").with_options("assign-precision", overrides=overrides)
    for quantized in (compiled(model, SMALL, {}, layers="all"), compiled(model, SMALL, recipe=advised)):
        assert max(error(quantized, model), error(quantized, model, **SMALL)) < 0.05


def test_an_attention_that_a_call_uses_more_often_is_refused_with_what_to_do() -> None:
    model = Attentive().eval()
    expected = "'blocks.0' twice, but the calibration calls use it once, so it is not known what ranges the further"
    with pytest.raises(CalibrationError, match=expected):
        compiled(model, {}, layers="all")(**call(**SMALL))
    quantized = compiled(model, {}, SMALL, layers="all")
    assert max(error(quantized, model), error(quantized, model, **SMALL)) < 0.05


class Tied(nn.Module):
    """Two layers that share a weight, of which some calls run one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.ModuleDict({name: nn.Linear(4, 4) for name in ("a", "b")})])
        self.blocks[0]["b"].weight = self.blocks[0]["a"].weight

    def forward(self, sample: Tensor, timestep: Tensor, only: bool = False) -> Tensor:
        (block,) = self.blocks
        h = sample if only else sample + block["b"](sample * 0.02)
        return h + F.gelu(block["a"](h)) * torch.sin(timestep.float())[:, None, None]


def tied(overrides: str = "") -> tuple[nn.Module, fxquant.GraphModel]:
    model = Tied().eval()
    recipe = fxquant.make_recipe("rtn-w8a8").with_options("assign-precision", overrides=overrides)

    def calibrate() -> None:
        for only in (False, True):
            for seed in range(3):
                model(**call(seed), only=only)

    return model, fxquant.compile(model, recipe=recipe, calibrate=calibrate, measure=0)


@pytest.mark.parametrize("overrides", ["", "blocks.0.a=w4a8", "blocks.0.b=w4a8", "blocks.0.b=float"])
def test_tied_layers_are_told_apart(overrides: str, tmp_path: Path) -> None:
    model, quantized = tied(overrides)
    layers = quantized.plan.layers
    assert {*layers} == {"blocks.0.a", "blocks.0.b"}
    for entry in filter(None, overrides.split(";")):
        name, _, precision = entry.partition("=")
        assert str(layers[name].precision) == precision
    assert layers["blocks.0.a"].activation.high > 1
    assert "blocks.0.b=float" in overrides or layers["blocks.0.b"].activation.high < 0.2
    fxquant.save(quantized, tmp_path / "q")
    loaded = fxquant.load(tmp_path / "q", model=Tied().eval())
    for only in (False, True):
        with torch.no_grad():
            actual = quantized(**call(7), only=only)
            assert relative_error([actual], [model(**call(7), only=only)]) < (0.15 if "w4" in overrides else 0.03)
            assert torch.equal(loaded(**call(7), only=only), actual)


def test_a_layer_that_no_call_ran_does_not_pass_for_the_one_it_shares_its_weight_with() -> None:
    class Either(Tied):
        def forward(self, sample: Tensor, timestep: Tensor, first: bool = False) -> Tensor:
            return sample + self.blocks[0]["a" if first else "b"](sample) * timestep[:, None, None]

    for first in (False, True):
        model = Either().eval()
        calibrate = lambda model=model, first=first: model(**call(), first=first)  # noqa: E731
        quantized = fxquant.compile(model, recipe="rtn-w8a8", calibrate=calibrate, measure=0)
        with pytest.raises(CalibrationError, match=f"the plan knows no layer 'blocks.0.{'b' if first else 'a'}'"):
            quantized(**call(), first=not first)


def test_plans_of_earlier_names_are_carried_out() -> None:
    model, quantized = tied()
    plan = quantized.plan
    nodes = [node for node in quantized.captured[0].module.graph.nodes if "weight_packed" in str(node.target)]
    owner = str(nodes[0].target).removesuffix(".weight_packed")  # The name that torch.export gives the weight.
    renamed = {"blocks.0.b": owner, "blocks.0.a": f"{owner}@2"}  # In the order of the graph.
    plan.layers = {renamed[name]: layer for name, layer in plan.layers.items()}
    plan.calls, plan.naming = plan.calls[:1], 1
    again = fxquant.compile(model, plan=plan)
    with torch.no_grad():
        assert torch.equal(again(**call(7)), quantized(**call(7)))
