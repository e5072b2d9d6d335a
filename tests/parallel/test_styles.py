"""Which layers become column-wise and row-wise, and why others do not."""

from __future__ import annotations

import pytest
from torch import nn

import fxquant
from fxquant.errors import ConfigurationError
from tests.parallel.models import Blocks, kinds, quantized


def test_attention_and_gated_feed_forward() -> None:
    plan = fxquant.tensor_parallel_plan(quantized(Blocks()), 2)
    assert kinds(plan) == {
        "qkv": "column-wise", "out": "row-wise", "up": "column-wise", "down": "row-wise",
        "side": "column-wise, gathered", "joined": "column-wise, gathered",
    }  # fmt: skip
    assert plan["qkv"].runs == (24, 24, 24)
    assert plan["up"].runs == (32, 32)
    assert "joined cannot be row-wise: a norm needs all of its channels" in plan["side"].why
    assert "row-wise" in str(plan)


@pytest.mark.parametrize(
    ("model", "size", "layer", "style", "why"),
    [
        (Blocks(heads=3), 2, "out", "column-wise, gathered", "3 heads are not divisible by 2"),
        (Blocks(hidden=33), 2, "down", "column-wise, gathered", "33 channels of down are not divisible by 2"),
        (Blocks(), 5, "qkv", "replicated", "72 channels of qkv are not divisible by 5"),
        (Blocks(times=2), 2, "out", "row-wise", "reads channels of qkv"),
    ],
)
def test_what_does_not_fit(model: nn.Module, size: int, layer: str, style: str, why: str) -> None:
    plan = fxquant.tensor_parallel_plan(quantized(model), size)
    assert kinds(plan)[layer] == style
    assert why in plan[layer].why


def test_groups_of_input_channels_stay_on_one_rank() -> None:
    plan = fxquant.tensor_parallel_plan(quantized(Blocks(), "rtn-w4a8-g8"), 2)
    assert kinds(plan)["down"] == "row-wise"
    assert "groups of 8 input channels" in plan["out"].why


def test_what_is_not_a_plan_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="takes a model that"):
        fxquant.tensor_parallel_plan(Blocks(), 2)
    model = quantized(Blocks())
    for size, message in ((1, "at least 2"), ("two", "number of ranks")):
        with pytest.raises(ConfigurationError, match=message):
            fxquant.tensor_parallel_plan(model, size)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="no quantized layer 'x'"):
        fxquant.tensor_parallel_plan(model, 2)["x"]
    with pytest.raises(ConfigurationError, match="mesh should be a device mesh"):
        fxquant.parallelize(model, None)  # type: ignore[arg-type]
