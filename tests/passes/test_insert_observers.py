from __future__ import annotations

import pytest

from fxquant.errors import CalibrationError, MissingTimestepError
from fxquant.plan import Plan
from tests.passes.models import Patches, patches, planned
from tests.support import golden, rewritten

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


def test_readers_of_one_value_share_a_key() -> None:
    plan = Plan("", "", "timestep")
    rewritten(Patches(), "assign-precision{layers=all},insert-observers", plan, **patches())
    assert [plan.layers[name].observed for name in ("conv", "q", "k")] == ["conv", "q", "q"]


def test_layers_with_float_activations_are_not_observed() -> None:
    plan = planned(conv=("conv", [4, 8], 8, None, 0), q=FLOAT, k=FLOAT)
    before, after = rewritten(Patches(), "insert-observers", plan, **patches())
    assert after == before


def test_an_input_of_another_name_is_no_timestep() -> None:
    plan = Plan("", "", "step")
    with pytest.raises(MissingTimestepError, match=r"no tensor input 'step'.* inputs are: x, timestep") as error:
        rewritten(Patches(), "assign-precision{layers=all},insert-observers", plan, **patches())
    assert error.value.__notes__ == ["in pass insert-observers"]


def test_a_layer_that_the_plan_does_not_know() -> None:
    with pytest.raises(CalibrationError, match="the plan knows no layer 'conv'"):
        rewritten(Patches(), "insert-observers", planned(q=FLOAT), **patches())
