from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.errors import ConfigurationError
from fxquant.passes.assign_precision import AssignPrecision
from fxquant.plan import LayerPlan, Plan
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "w9a8"}, "9 bits for weights"),
        ({"precision": "int8"}, "'int8' is no precision"),
        ({"layers": "most"}, "layers='most' is not known"),
        ({"overrides": "proj_out"}, "override 'proj_out' has no precision"),
    ],
)
def test_bad_options_are_refused_at_once(options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        AssignPrecision(**options)
