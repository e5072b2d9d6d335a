from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.errors import ConfigurationError
from fxquant.ir.stages import Stage
from fxquant.passes.shift_channels import ShiftChannels
from fxquant.pipeline.pipeline import Pipeline, parse_pass
from fxquant.planning.context import PassContext
from fxquant.planning.decisions import Shift
from tests.passes.models import Timed, moving, planned, seen, timed
from tests.support import captured, golden, outputs, relative_error, rewritten, text

TWO = "group-timesteps{groups=2},shift-channels"
ONE = "group-timesteps{groups=1},shift-channels"


def test_before_and_after() -> None:
    context = moving(out=("linear", [3, 4], None, None, 0))
    before, after = rewritten(Timed(), TWO, context, **timed())
    assert before.splitlines()[-5:] == [
        "add_2: float32[B, 3, 4] = add.Tensor(mul, getitem_1)",
        "linear_1: float32[B, 3, 4] = linear(add_2, @q.weight, @q.bias)",
        "linear_2: float32[B, 3, 3] = linear(linear_1, @out.weight, @out.bias)",
        "linear_3: float32[B, 3, 2] = linear(add_2, @k.weight)",
        "return linear_2, linear_3",
    ]
    assert after == golden(
        """
        x: float32[B, 3, 4]
        timestep: int64[B]
        text: float32[B, 4]
        timestep_number: float32[B] = to.dtype(timestep, float32)
        timestep_bins: int64[B] = bucketize.Tensor(timestep_number, @timestep_boundaries)
        timestep_bin: int64[B] = view(timestep_bins, [-1])
        """
    ) + "\n" + "\n".join(before.splitlines()[3:-4]) + "\n" + golden(
        """
        row: float64[B, 4] = index_select(@q.shift, 0, timestep_bin)
        rows: float64[B, 1, 4] = view(row, [-1, 1, 4])
        add_2_shifted: float32[B, 3, 4] = fxquant::channel_affine(add_2, @q.one, rows)
        linear_1: float32[B, 3, 4] = linear(add_2_shifted, @q.weight)
        row_1: float32[B, 4] = index_select(@q.rows, 0, timestep_bin)
        rows_1: float32[B, 1, 4] = view(row_1, [-1, 1, 4])
        linear_1_shifted: float32[B, 3, 4] = add.Tensor(linear_1, rows_1)
        linear_2: float32[B, 3, 3] = linear(linear_1_shifted, @out.weight, @out.bias)
        linear_3: float32[B, 3, 2] = linear(add_2_shifted, @k.weight)
        row_2: float32[B, 2] = index_select(@k.rows, 0, timestep_bin)
        rows_2: float32[B, 1, 2] = view(row_2, [-1, 1, 2])
        linear_3_shifted: float32[B, 3, 2] = add.Tensor(linear_3, rows_2)
        return linear_2, linear_3_shifted
        """
    )  # fmt: skip


def test_with_one_bin_the_shift_is_a_constant_and_the_bias_stays_one() -> None:
    context = moving(out=("linear", [3, 4], None, None, 0))
    before, after = rewritten(Timed(), ONE, context, **timed())
    assert after.splitlines()[: len(before.splitlines()) - 4] == before.splitlines()[:-4]
    assert after.splitlines()[-5:] == [
        "add_2_shifted: float32[B, 3, 4] = fxquant::channel_affine(add_2, @q.one, @q.shift)",
        "linear_1: float32[B, 3, 4] = linear(add_2_shifted, @q.weight, @q.bias)",
        "linear_2: float32[B, 3, 3] = linear(linear_1, @out.weight, @out.bias)",
        "linear_3: float32[B, 3, 2] = linear(add_2_shifted, @k.weight, @k.bias)",
        "return linear_2, linear_3",
    ]


def test_what_the_plan_says() -> None:
    context = moving()
    rewritten(Timed(), TWO, context, **timed())
    # Middles of the first channel 8, 7 | 0, -4 and of the second half of that plus 1.
    assert context.plan.vectors["q.shift"].tolist() == [[-2.0, 0.0, 0.0, 3.0], [7.5, 4.75, 0.0, 3.0]]
    assert torch.equal(context.plan.vectors["k.shift"], context.plan.vectors["q.shift"])
    assert context.plan.layers["q"].shift == Shift("free", ["time"], 4) == context.plan.layers["k"].shift
    assert context.plan.layers["out"].shift == Shift("free", ["q"], 4)
    assert context.plan.layers["time"].shift is None


@pytest.mark.parametrize("passes", [ONE, TWO])
def test_the_bias_takes_what_the_shift_gives(passes: str) -> None:
    model = Timed().double()
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in timed(3).items()}
    module = captured(model, **inputs).module
    expected = outputs(module, *inputs.values())
    own = model.q.bias.detach().clone()
    context = moving()
    Pipeline.parse(passes).run(module, context)
    assert relative_error(outputs(module, *inputs.values()), expected) < 1e-14
    rows = module.get_parameter("q.bias")[None] if passes == ONE else module.get_parameter("q.rows")
    torch.testing.assert_close(
        rows.reshape(-1, 4), own + context.plan.vectors["q.shift"] @ model.q.weight.T, rtol=0, atol=1e-14
    )


class Shared(nn.Module):
    """A value that something else reads, and one behind GELU."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.shared, self.gelu = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        x = x + timestep[:, None, None]
        y = self.a(x)
        return self.shared(y), y.sigmoid(), self.gelu(F.gelu(self.b(x)))


@pytest.mark.parametrize("passes", [ONE, TWO])
def test_must_not_fire(passes: str) -> None:
    inputs = {"x": torch.randn(2, 4, 4), "timestep": torch.zeros(2)}
    layer = ("linear", [4, 4], 8, 8, 0)
    producers = dict.fromkeys("ab", ("linear", [4, 4], None, None, 0))
    context = PassContext(planned(**producers, shared=layer, gelu=layer))
    for name in ("shared", "gelu"):
        seen(context, name, {step: [(0.0, step)] * 4 for step in (1.0, 2.0, 3.0)})
    before, after = rewritten(Shared(), passes, context, **inputs)
    assert after == before
    assert not context.plan.vectors
    reasons = {name: context.plan.layers[name].shift.reason for name in ("shared", "gelu")}
    assert all(context.plan.layers[name].shift == Shift("not", [], 0, reason) for name, reason in reasons.items())
    assert "also read by sigmoid" in reasons["shared"]
    assert reasons["gelu"] == "gelu is nonlinear"


def test_a_wrong_axis_gets_one_shift_for_all() -> None:
    """Where tokens stand for channels, a linear before them can only shift all of them alike."""

    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.q = nn.Linear(4, 4), nn.Linear(3, 4)

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return self.q(self.a(x + timestep[:, None, None]).transpose(1, 2))

    context = PassContext(planned(a=("linear", [4, 4], None, None, 0), q=("linear", [4, 3], 8, 8, 0)))
    seen(context, "q", {500.0: [(0.0, 2.0), (1.0, 5.0), (4.0, 6.0)], 100.0: [(1.0, 1.0)] * 3})
    rewritten(Transposed(), ONE, context, x=torch.randn(2, 3, 4), timestep=torch.zeros(2))
    # Means of 1 and 1, 3 and 1, 5 and 1, and of these.
    assert context.plan.vectors["q.shift"].tolist() == [[2.0, 2.0, 2.0]]


def test_layers_with_float_weights_or_of_other_roles_stay() -> None:
    for change in ("role", "weight_bits"):
        context = moving()
        for name in ("q", "k", "out"):
            setattr(context.plan.layers[name], change, "final" if change == "role" else None)
        before, after = rewritten(Timed(), TWO, context, **timed())
        assert after == before


def test_a_second_run_changes_nothing_and_a_plan_is_carried_out_again() -> None:
    context = moving()
    module = captured(Timed(), **timed()).module
    Pipeline.parse(TWO).run(module, context)
    once = text(module)
    assert [record.edits for record in Pipeline.parse(TWO).run(module, context, Stage.TRANSFORMED)] == [0, 0]
    assert text(module) == once
    assert rewritten(Timed(), TWO, context.plan, **timed())[1] == once


def test_layers_that_are_shifted_together_have_to_be_grouped_together() -> None:
    context = moving()
    rewritten(Timed(), "group-timesteps{groups=2}", context, **timed())
    context.plan.layers["k"].timesteps = None
    with pytest.raises(ConfigurationError, match=r"layers q, k are shifted together.*same dearest= and roles="):
        rewritten(Timed(), "shift-channels", context, **timed())
    assert not context.plan.vectors and context.plan.layers["q"].shift is None


def test_options_round_trip_and_bad_ones_are_refused_at_once() -> None:
    step = ShiftChannels(dearest="free", roles="block+final")
    assert parse_pass(str(step)) == step and str(step) == "shift-channels{dearest=free roles=block+final}"
    for options, message in {
        "dearest=gold": "'gold' is not a cost",
        "roles=attention": "attention is not a role",
    }.items():
        with pytest.raises(ConfigurationError, match=message):
            parse_pass(f"shift-channels{{{options}}}")


def test_a_plan_without_statistics_says_so() -> None:
    plan = moving().plan
    with pytest.raises(Exception, match="no calibration statistics"):
        rewritten(Timed(), "shift-channels", plan, **timed())
