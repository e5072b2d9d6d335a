"""What the rules do is proved in tests/channels and tests/fuzz; here is the graph before and after."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxquant.ir.stages import Stage
from fxquant.passes.absorb_shifts import AbsorbShifts
from fxquant.pipeline.pipeline import Pipeline, parse_pass
from fxquant.planning.context import PassContext
from fxquant.planning.plan import Plan
from tests.passes.models import Timed, moving, planned, seen, timed
from tests.support import captured, golden, rewritten, text

ONE, TWO = (f"group-timesteps{{groups={groups}}},shift-channels,absorb-shifts" for groups in (1, 2))
NO_OUT = ("linear", [3, 4], None, None, 0)


def test_a_constant_shift_leaves_the_graph_as_it_was() -> None:
    # But for the bias that k lacked.
    before, after = rewritten(Timed(), ONE, moving(), **timed())
    assert after == before.replace("linear(add_2, @k.weight)", "linear(add_2, @k.weight, @k.bias)")


def test_before_and_after() -> None:
    shifted = rewritten(Timed(), TWO.removesuffix(",absorb-shifts"), moving(out=NO_OUT), **timed())[1].splitlines()
    _, after = rewritten(Timed(), TWO, moving(out=NO_OUT), **timed())
    assert after.splitlines()[:6] == shifted[:6]  # The bin of each sample.
    assert "\n".join(after.splitlines()[6:]) == golden(
        """
        slice_1: int64[B] = slice.Tensor(timestep, 0, 0, 9223372036854775807)
        unsqueeze: int64[B, 1] = unsqueeze(slice_1, 1)
        div: float32[B, 1] = div.Tensor(unsqueeze, 1000)
        add: float32[B, 4] = add.Tensor(text, div)
        silu: float32[B, 4] = silu(add)
        linear: float32[B, 8] = linear(silu, @time.weight)
        row_3: float32[B, 8] = index_select(@time.rows, 0, timestep_bin)
        rows_3: float32[B, 8] = view(row_3, [-1, 8])
        linear_shifted: float32[B, 8] = add.Tensor(linear, rows_3)
        unsqueeze_1: float32[B, 1, 8] = unsqueeze(linear_shifted, 1)
        chunk = chunk(unsqueeze_1, 2, -1)
        getitem: float32[B, 1, 4] = getitem(chunk, 0)
        getitem_1: float32[B, 1, 4] = getitem(chunk, 1)
        layer_norm: float32[B, 3, 4] = layer_norm(x, [4], None, None, 1e-05, False)
        add_1: float32[B, 1, 4] = add.Tensor(getitem, 1)
        mul: float32[B, 3, 4] = mul.Tensor(layer_norm, add_1)
        add_2: float32[B, 3, 4] = add.Tensor(mul, getitem_1)
        linear_1: float32[B, 3, 4] = linear(add_2, @q.weight)
        row_1: float32[B, 4] = index_select(@q.rows, 0, timestep_bin)
        rows_1: float32[B, 1, 4] = view(row_1, [-1, 1, 4])
        linear_1_shifted: float32[B, 3, 4] = add.Tensor(linear_1, rows_1)
        linear_2: float32[B, 3, 3] = linear(linear_1_shifted, @out.weight, @out.bias)
        linear_3: float32[B, 3, 2] = linear(add_2, @k.weight)
        row_2: float32[B, 2] = index_select(@k.rows, 0, timestep_bin)
        rows_2: float32[B, 1, 2] = view(row_2, [-1, 1, 2])
        linear_3_shifted: float32[B, 3, 2] = add.Tensor(linear_3, rows_2)
        return linear_2, linear_3_shifted
        """
    )


@pytest.mark.parametrize("passes", [ONE, TWO])
def test_the_shift_goes_into_beta_and_leaves_gamma_and_the_weight_alone(passes: str) -> None:
    model, context = Timed(), moving(out=NO_OUT)
    weight, bias = model.time.weight.detach().clone(), model.time.bias.detach().clone()
    module = captured(model, **timed()).module
    Pipeline.parse(passes).run(module, context)
    rows = (module.get_parameter("time.bias")[None] if passes == ONE else module.get_parameter("time.rows")).view(-1, 8)
    torch.testing.assert_close(rows[:, :4], bias[:4].expand(len(rows), 4), rtol=0, atol=0)
    torch.testing.assert_close(rows[:, 4:], (bias[4:].double() - context.plan.vectors["q.shift"]).float())
    assert torch.equal(module.get_parameter("time.weight"), weight)


class Behind(nn.Module):
    """A linear behind a value that has no bias to end in."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.a, self.q, self.k = kind, nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        x = self.a(x) + timestep[:, None, None]
        y = {"shared": x, "gelu": nn.functional.gelu(x), "product": x * x.mean()}[self.kind]
        return self.q(y), y.sigmoid() if self.kind == "shared" else self.k(y)


@pytest.mark.parametrize("kind", ["shared", "gelu", "product"])
@pytest.mark.parametrize("rows", [1, 2])
def test_must_not_fire(kind: str, rows: int) -> None:
    """A shift that is asked for all the same, by an edited plan, stays at run time, and the function with it."""
    layer = ("linear", [4, 4], 8, 8, 0)
    context = PassContext(planned(a=("linear", [4, 4], None, None, 0), q=layer, k=layer))
    inputs = {"x": torch.randn(2, 3, 4).double(), "timestep": torch.tensor([100.0, 900.0]).double()}
    for step in (1.0, 500.0, 999.0):
        seen(context, "q", {step: [(0.0, 1.0)] * 4})
    context.plan.layers["k"].observed = "q"
    first = f"group-timesteps{{groups={rows}}},shift-channels"
    model = Behind(kind).double()
    module = captured(model, **inputs).module
    expected = model(*inputs.values())
    Pipeline.parse(first).run(module, context)
    assert not context.plan.vectors  # Nothing can take a shift, so nothing is shifted; now somebody wants one.
    context.plan.vectors["q.shift"] = torch.arange(4.0 * rows).double().reshape(rows, 4)
    Pipeline.parse("shift-channels").run(module, context, Stage.TRANSFORMED)
    before = text(module)
    assert "channel_affine" in before
    (record,) = Pipeline.parse("absorb-shifts").run(module, context, Stage.TRANSFORMED)
    assert (record.edits, text(module)) == (0, before)
    for actual, right in zip(module(*inputs.values()), expected, strict=True):
        torch.testing.assert_close(actual, right)


def test_affines_that_scale_are_not_its_business() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.factor, self.shift = (nn.Parameter(torch.full((4,), value)) for value in (2.0, 1.0))

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return torch.ops.fxquant.channel_affine(self.a(x), self.factor, self.shift)

    module = captured(Scaled(), x=torch.randn(2, 4), timestep=torch.zeros(2)).module
    before = text(module)
    (record,) = Pipeline.parse("absorb-shifts").run(module, Plan("", "", "timestep"), Stage.TRANSFORMED)
    assert (record.edits, text(module)) == (0, before)


def test_a_second_run_changes_nothing_and_a_plan_is_carried_out_again() -> None:
    context = moving()
    module = captured(Timed(), **timed()).module
    Pipeline.parse(TWO).run(module, context)
    once = text(module)
    assert [record.edits for record in Pipeline.parse(TWO).run(module, context, Stage.TRANSFORMED)] == [0, 0, 0]
    assert text(module) == once
    assert rewritten(Timed(), TWO, context.plan, **timed())[1] == once


def test_it_has_no_options() -> None:
    assert parse_pass("absorb-shifts") == AbsorbShifts() and str(AbsorbShifts()) == "absorb-shifts"
