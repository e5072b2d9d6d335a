from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxquant.errors import CalibrationError, MissingTimestepError
from fxquant.ir.ops import recording
from fxquant.ir.rewriter import Rewriter
from fxquant.passes.insert_observers import InsertObservers
from fxquant.pipeline.pipeline import Pipeline
from fxquant.planning.context import PassContext
from fxquant.planning.plan import Plan
from fxquant.statistics.collection import Statistics
from tests.passes.models import Patches, patches, planned
from tests.support import captured, golden, outputs, rewritten, text

FLOAT = ("linear", [2, 4], 8, None, 0)


def test_before_and_after() -> None:
    before, after = rewritten(Patches(), "assign-precision{layers=all},insert-observers", **patches())
    assert before == golden(
        """
        x: float32[B, 2, 4, 4]
        timestep: float32[B]
        conv2d: float32[B, 4, 2, 2] = conv2d(x, @conv.weight, @conv.bias, [2, 2])
        flatten: float32[B, 4, 4] = flatten.using_ints(conv2d, 2)
        transpose: float32[B, 4, 4] = transpose.int(flatten, 1, 2)
        linear: float32[B, 4, 4] = linear(transpose, @q.weight, @q.bias)
        linear_1: float32[B, 4, 2] = linear(transpose, @k.weight)
        return linear, linear_1
        """
    )
    assert after == golden(
        """
        x: float32[B, 2, 4, 4]
        timestep: float32[B]
        x_observed: float32[B, 2, 4, 4] = fxquant::observe(x, timestep, conv, 1)
        conv2d: float32[B, 4, 2, 2] = conv2d(x_observed, @conv.weight, @conv.bias, [2, 2])
        flatten: float32[B, 4, 4] = flatten.using_ints(conv2d, 2)
        transpose: float32[B, 4, 4] = transpose.int(flatten, 1, 2)
        transpose_observed: float32[B, 4, 4] = fxquant::observe(transpose, timestep, q, -1)
        linear: float32[B, 4, 4] = linear(transpose_observed, @q.weight, @q.bias)
        linear_1: float32[B, 4, 2] = linear(transpose_observed, @k.weight)
        return linear, linear_1
        """
    )


def test_a_value_with_its_tokens_first_is_observed_by_sample() -> None:
    class TokensFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(4, 4)

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return self.q(x.transpose(0, 1))

    model, x, timestep = TokensFirst().eval(), torch.randn(2, 5, 4), torch.tensor([1.0, 2.0])
    plan, statistics = Plan("", "", "timestep"), Statistics()
    module = captured(model, x=x, timestep=timestep).module
    expected = outputs(module, x, timestep)[0]
    Pipeline.parse("assign-precision{layers=all},insert-observers").run(module, plan)
    before = text(module)
    with recording(statistics.record), torch.no_grad():
        assert torch.equal(module(x, timestep)[0], expected)
    assert statistics.timesteps.tolist() == [1.0, 2.0]
    torch.testing.assert_close(statistics["q"].absmax, x.abs().amax(dim=1))
    # A pipeline takes captured graphs alone.
    InsertObservers().run(module.graph, PassContext(plan), Rewriter(module, "test"))
    assert text(module) == before, "a second run changed the graph"


def test_readers_of_one_value_share_a_key() -> None:
    plan = Plan("", "", "timestep")
    rewritten(Patches(), "assign-precision{layers=all},insert-observers", plan, **patches())
    assert [plan.layers[name].observed for name in ("conv", "q", "k")] == ["conv", "q", "q"]


def test_layers_with_float_activations_are_not_observed() -> None:
    plan = planned(conv=("conv", [4, 8], 8, None, 0), q=FLOAT, k=FLOAT)
    before, after = rewritten(Patches(), "insert-observers", plan, **patches())
    assert after == before


def test_linears_with_float_activations_are_observed_by_name() -> None:
    plan = planned(conv=("conv", [4, 8], 8, None, 0), q=FLOAT, k=FLOAT)
    before, after = rewritten(Patches(), "insert-observers{weight-only=k;conv1}", plan, **patches())
    observer = "transpose_observed: float32[B, 4, 4] = fxquant::observe(transpose, timestep, k, -1)"
    assert after.splitlines()[-3:-1] == [observer, before.splitlines()[-2].replace("transpose", "transpose_observed")]
    assert after.count("fxquant::observe") == 1
    assert [plan.layers[name].observed for name in ("conv", "q", "k")] == [None, None, "k"]


def test_an_input_of_another_name_is_no_timestep() -> None:
    plan = Plan("", "", "step")
    with pytest.raises(MissingTimestepError, match=r"no tensor input 'step'.* inputs are: x, timestep") as error:
        rewritten(Patches(), "assign-precision{layers=all},insert-observers", plan, **patches())
    assert error.value.__notes__ == ["in pass insert-observers"]


def test_a_layer_that_the_plan_does_not_know() -> None:
    with pytest.raises(CalibrationError, match="the plan knows no layer 'conv'"):
        rewritten(Patches(), "insert-observers", planned(q=FLOAT), **patches())


def test_a_linear_that_reads_an_observed_linear() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    plan = planned(**{"0": ("linear", [4, 4], 8, 8, 0), "1": ("linear", [2, 4], 8, 8, 0)})
    plan.timestep = "input"
    _, after = rewritten(module, "insert-observers", plan, input=torch.randn(3, 4))
    assert after.count("fxquant::observe") == 2
