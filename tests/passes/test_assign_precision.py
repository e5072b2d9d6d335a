from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.errors import ConfigurationError
from fxquant.passes.assign_precision import AssignPrecision
from fxquant.planning.decisions import LayerPlan
from fxquant.planning.plan import Plan
from tests.passes.test_proof import Block, inputs
from tests.support import rewritten


def assigned(options: str = "", plan: Plan | None = None) -> dict[str, str]:
    plan = plan or Plan("", "", "timestep")
    names = ("sample", "timestep", "labels")
    before, after = rewritten(
        Block(), f"assign-precision{options}", plan, **dict(zip(names, inputs(torch.float32), strict=True))
    )
    assert after == before
    return {name: f"{layer.role} {layer.precision}" for name, layer in plan.layers.items()}


def test_the_plan_afterwards() -> None:
    assert assigned("{precision=w4a8}") == {
        "patch": "patch float",
        "table": "embedder w8a16",
        "modulation": "adaln w4a8",
        **{f"blocks.0.{name}": "block w4a8" for name in ("q", "k", "v", "out", "gate", "up")},
        "last": "final float",
    }


def test_groups_are_for_linears() -> None:
    found = assigned("{precision=w4a8-g8 layers=all}")
    assert found["patch"] == "patch w4a8"
    assert found["last"] == "final w4a8-g8"
    assert found["table"] == "embedder float"


def test_overrides_decide_by_name_and_the_first_counts() -> None:
    found = assigned("{overrides=blocks.0.q=float;blocks.0.*=w4a16;last=w2a4}")
    assert found["blocks.0.q"] == "block float"
    assert found["blocks.0.k"] == "block w4a16"
    assert found["last"] == "final w2a4"


def test_what_the_plan_says_stays() -> None:
    plan = Plan("", "", "timestep", layers={"last": LayerPlan("linear", "final", [4, 16], 3, 5)})
    assert assigned(plan=plan)["last"] == "final w3a5"


class Computed(nn.Module):
    """A linear whose weight is computed has no weight to store."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 2)


def test_a_weight_made_in_the_graph_stays_float() -> None:
    plan = Plan("", "", None)
    rewritten(Computed(), "assign-precision{layers=all}", plan, x=torch.randn(2, 4))
    assert not plan.layers
    ((name, reason),) = plan.products.items()
    assert name.startswith("linear:")
    assert "its weight is computed in the graph" in reason


class Empty(nn.Module):
    """A branch of no width, as a config with a width of 0 makes it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 0), nn.Linear(0, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 0), nn.Linear(8, 8)])

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = self.norm(x)
        return self.blocks[1](x) + self.down(self.up(x)) + self.blocks[0](x).sum() + timestep[:, None, None]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("recipe", ["ptq4dit-w8a8", "dynamic-w8a8", "htg-w8a8"])
def test_weights_without_elements_stay_float(recipe: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Empty().eval()

    def calibrate() -> None:
        for step in (900.0, 100.0):
            model(torch.randn(2, 4, 8), torch.full((2,), step))

    quantized = fxquant.compile(model, recipe=recipe, layers="all", calibrate=calibrate, measure=0)
    floats = {name: layer.reason for name, layer in quantized.plan.layers.items() if layer.weight_bits is None}
    assert floats == dict.fromkeys(["up", "down", "blocks.0"], "its weight has no elements")
    call = (torch.randn(2, 4, 8), torch.full((2,), 100.0))
    torch.testing.assert_close(quantized(*call), model(*call), atol=0.1, rtol=0)
    fxquant.save(quantized, tmp_path / "model", needs_model=True)
    assert torch.equal(fxquant.load(tmp_path / "model", model=model)(*call), quantized(*call))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "w9a8"}, "9 bits for weights"),
        ({"precision": "int8"}, "'int8' is not a precision"),
        ({"layers": "most"}, "layers='most' is not known"),
        ({"overrides": "proj_out"}, "override 'proj_out' has no precision"),
    ],
)
def test_bad_options_are_refused_at_once(options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        AssignPrecision(**options)


class Optional(nn.Module):
    """A block with attention, and a branch of an optional input."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({name: nn.Linear(4, 4) for name in ("to_q", "to_k", "fc")})])
        self.extra = nn.ModuleDict({"proj": nn.Linear(4, 4)})

    def forward(self, sample: Tensor, timestep: Tensor, more: Tensor | None = None) -> Tensor:
        if more is not None:
            sample = sample + self.extra["proj"](more)
        for block in self.blocks:
            q, k = (block[name](sample)[:, None] for name in ("to_q", "to_k"))
            sample = sample + block["fc"](F.scaled_dot_product_attention(q, k, k)[:, 0] @ torch.eye(4))
        return sample * timestep[:, None, None]


def compiled(overrides: str, *more: bool, attention: str = "float") -> fxquant.GraphModel:
    model = Optional().eval()
    calls: list[bool] = []

    def calibrate() -> None:
        for given in more or (False,):
            x = torch.randn(2, 3, 4)
            model(x, torch.tensor([1, 2]), more=x if given else None)
            calls.append(given)

    recipe = fxquant.make_recipe("rtn-w8a8").with_options("assign-precision", overrides=overrides, attention=attention)
    try:
        return fxquant.compile(model, recipe=recipe, calibrate=calibrate, measure=0)
    except ConfigurationError as error:
        error.add_note(f"after {len(calls)} calls")
        raise


@pytest.mark.parametrize(
    ("overrides", "message", "calls"),
    [
        ("blocks.0.toq=float", r"fits no layer and no attention of the model; did you mean 'blocks.0.to_q'", 0),
        ("block.*.to_k=w4a8", r"did you mean 'blocks.\*.to_k'", 0),
        ("blocks.0=float", r"fits no layer and no attention of the model; did you mean 'blocks.0", 0),
        ("blocks.0.to_q=float;zzz=float", r"'zzz' fits no layer .* its layers are blocks.\*.to_q, ", 0),
        ("blocks.0.to_q.bias=float", "fits no layer", 0),
        ("extra.proj=float", "override 'extra.proj' fits no layer", 1),  # Runs in no call of this calibration.
        ("extra.prj=float", "override 'extra.prj' fits no layer", 0),
        ("*matmul*=w8a8", "and that cannot be quantized: it multiplies", 0),
        ("attention=w8a8", "fits the attention 'attention' and no layer, and the recipe keeps attention in float", 0),
    ],
)
def test_an_override_that_decides_nothing_is_an_error(overrides: str, message: str, calls: int) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        compiled(overrides)
    assert f"after {calls} calls" in caught.value.__notes__


def test_overrides_for_what_runs_later_or_is_float_are_taken() -> None:
    plan = compiled("extra.proj=w8a8;*matmul*=float;attention=float", False, True).plan
    assert str(plan.layers["extra.proj"].precision) == "w8a8"
    assert compiled("attention=float", attention="quantized").plan.attentions["attention"].bits is None


def test_overrides_decide_for_tables_too() -> None:
    found = assigned("{overrides=table=float}")
    assert found["table"] == "embedder float"
    assert assigned("{overrides=table=w4a8}")["table"] == "embedder w4a16"
    assert assigned("{layers=all overrides=table=w6a16}")["table"] == "embedder w6a16"


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ("default", "layers=default keeps layers of role patch in float; layers=all quantizes them"),
        ("blocks", "layers=blocks keeps layers of role patch in float; layers=all quantizes them"),
    ],
)
def test_float_layers_have_a_reason(layers: str, reason: str) -> None:
    plan = Plan("", "", "timestep")
    assigned(f"{{layers={layers} overrides=blocks.0.q=float}}", plan)
    assert plan.layers["patch"].reason == reason
    assert plan.layers["blocks.0.q"].reason == "an override keeps it in float"
    assert plan.layers["blocks.0.k"].reason is None
