from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.errors import CalibrationError, ConfigurationError, NonFiniteError
from fxquant.passes.balance_channels import (
    BalanceChannels,
    Salience,
    balance_factor,
    combine_timesteps,
    of_salient_channels,
    spearman_weights,
)
from fxquant.pipeline.pipeline import Pipeline
from fxquant.planning.context import PassContext
from fxquant.planning.decisions import Balance
from fxquant.planning.plan import Plan
from tests import tiny
from tests.passes.models import AdaLN, adaln, planned, seen
from tests.support import captured, rewritten

Q = ("linear", [4, 4], 8, 8, 0)
TIME = ("linear", [8, 4], None, None, 0)
FACTORS = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)


def decided(**layers: tuple[str, list[int], int | None, int | None, int]) -> Plan:
    plan = planned(**({"q": Q, "time": TIME} | layers))
    plan.layers["q"].balance = Balance("free")
    plan.vectors["q"] = FACTORS
    return plan


def test_before_and_after() -> None:
    before, after = rewritten(AdaLN(), "balance-channels", decided(), **adaln())
    assert before.splitlines()[-2:] == [
        "linear_1: float32[B, 3, 4] = linear(add_1, @q.weight, @q.bias)",
        "return linear_1",
    ]
    assert after.splitlines() == [
        *before.splitlines()[:-2],
        "add_1_balanced: float32[B, 3, 4] = fxquant::channel_affine(add_1, @q.balance, None)",
        "linear_1: float32[B, 3, 4] = linear(add_1_balanced, @q.weight, @q.bias)",
        "return linear_1",
    ]


def test_columns_are_multiplied_by_what_the_channels_are_divided_by() -> None:
    model = AdaLN()
    module = captured(model, **adaln()).module
    Pipeline([BalanceChannels()]).run(module, decided())
    assert torch.equal(module.get_parameter("q.weight"), (model.q.weight.double() * FACTORS).float())
    assert torch.equal(module.get_parameter("q.balance"), 1 / FACTORS)


def test_layers_with_float_weights_or_of_other_roles_stay() -> None:
    for plan in (decided(q=("linear", [4, 4], None, None, 0)), decided()):
        if plan.layers["q"].weight_bits:
            plan.layers["q"].role = "final"
        before, after = rewritten(AdaLN(), "balance-channels", plan, **adaln())
        assert after == before


@pytest.mark.parametrize("bits", [4, 8])
def test_layers_with_float_activations_are_balanced_as_others(bits: int) -> None:
    _, expected = rewritten(AdaLN(), "balance-channels", decided(), **adaln())
    _, after = rewritten(AdaLN(), "balance-channels", decided(q=("linear", [4, 4], bits, None, 0)), **adaln())
    assert after == expected


def test_a_plan_that_says_nothing_of_layers_with_float_activations_leaves_them() -> None:
    plan = planned(q=("linear", [4, 4], 4, None, 0), time=TIME)  # One that is older than their balancing.
    text = "group-timesteps,shift-channels,balance-channels"
    before, after = rewritten(AdaLN(), text, plan, **adaln())
    assert after == before


def salient() -> nn.Module:
    """A DiT with salient channels before its feed-forward layers."""
    model = tiny.make_dit().double()
    with torch.no_grad():
        model.transformer_blocks[0].norm1.linear.bias.view(6, -1)[4, :2] = 40  # The factor behind the second norm.
        model.transformer_blocks[0].ff.net[0].proj.weight[:, :2] /= 40
    return model


def double(**call: Tensor) -> dict[str, Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in call.items()}


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_weights_alone_are_balanced_exactly_and_rounded_better(rounding: str, tmp_path: Path) -> None:
    model, steps = salient(), enumerate(tiny.STEPS)
    calls = [double(**tiny.inputs(2, step, seed=seed)) for seed, step in steps]
    balance, end = "balance-channels,absorb-affines", f"quantize-linears{{rounding={rounding}}}"
    errors = {}
    for middle in (balance, f"{balance},{end}", end):
        recipe = fxquant.Recipe.parse(f"remove-no-ops,assign-precision{{precision=w4a16}} ; {middle}")
        made = fxquant.compile(model, recipe=recipe, calibrate=lambda: [model(**call) for call in calls], measure=0)
        pairs = [(made(**call).sample, model(**call).sample.detach()) for call in calls]
        errors[middle] = max(float((a - b).norm() / b.norm()) for a, b in pairs)
        if middle == balance:
            balances = [layer.balance for layer in made.plan.layers.values() if layer.role == "block"]
            assert all(found is not None for found in balances)
            assert sum(found.cost == "free" for found in balances) == 5
        elif balance in middle:
            fxquant.save(made, tmp_path / "q")
            assert torch.equal(fxquant.load(tmp_path / "q")(**calls[0]).sample, pairs[0][0])
    exact, balanced, plain = errors.values()
    assert exact < 1e-12
    assert balanced < plain / 2


class Behind(nn.Module):
    """A linear whose input nothing can scale, for each of the reasons that there are."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.a, self.q = kind, nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        y = self.a(x + timestep[:, None, None])
        z = {"shared": y, "gelu": F.gelu(y), "residual": x}[self.kind]
        return (self.q(z), y.sigmoid()) if self.kind == "shared" else (self.q(z), y)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("shared", "also read by sigmoid"), ("gelu", "gelu is nonlinear"), ("residual", "also read by add")],
)
def test_must_not_fire(kind: str, reason: str) -> None:
    context = PassContext(planned(a=("linear", [4, 4], None, None, 0), q=Q))
    seen(context, "q", {step: [(0, 1), (0, 2), (0, 8), (-4, 4)] for step in (100.0, 900.0)})
    before, after = rewritten(
        Behind(kind), "balance-channels", context, x=torch.randn(2, 3, 4), timestep=torch.zeros(2)
    )
    assert after == before
    assert not context.plan.vectors
    assert context.plan.layers["q"].balance.cost == "not"
    assert reason in context.plan.layers["q"].balance.reason


def test_a_wrong_axis_gets_one_factor_for_all() -> None:
    """Where tokens stand for channels, a linear before them can only scale all of them alike."""

    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.q = nn.Linear(4, 4), nn.Linear(3, 4)

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return self.q(self.a(x + timestep[:, None, None]).transpose(1, 2))

    context = PassContext(planned(a=("linear", [4, 4], None, None, 0), q=("linear", [4, 3], 8, 8, 0)))
    seen(context, "q", {500.0: [(0, 2), (1, 5), (4, 60)]})
    rewritten(Transposed(), "balance-channels", context, x=torch.randn(2, 3, 4), timestep=torch.zeros(2))
    factors = context.plan.vectors["q"].tolist()
    assert factors == [factors[0]] * 3


def test_channels_that_are_not_salient_keep_their_weights() -> None:
    factors, alive = np.array([3.0, 2.0, 1.0, 9.0, 0.5, 1.0]), np.array([True, True, True, True, True, False])
    expected = [1.0, 1.0, 1.0, 4.5, 0.25, 1.0]  # Over the median of those alive, 2; half of it is within the ratio.
    assert of_salient_channels(factors, alive, 2.0).tolist() == expected
    dead = np.zeros(6, dtype=bool)
    assert of_salient_channels(factors, dead, 2.0).tolist() == [1.0] * 6


def test_recipes_for_weights_alone_balance_salient_channels_alone() -> None:
    model, steps = salient(), enumerate(tiny.STEPS)
    calls = [double(**tiny.inputs(2, step, seed=seed)) for seed, step in steps]
    changed = {}
    for salience in (1, 2):
        balance = f"balance-channels{{exponent=0.25 salient={salience}}},absorb-affines"
        recipe = fxquant.Recipe.parse(f"remove-no-ops,assign-precision{{precision=w4a16}} ; {balance}")
        made = fxquant.compile(model, recipe=recipe, calibrate=lambda: [model(**call) for call in calls], measure=0)
        factors = made.plan.vectors["transformer_blocks.0.ff.net.0.proj"]
        changed[salience] = int((factors != 1).sum())
        assert (factors[:2] / factors[2:].median()).min() > 4  # The two that are salient.
        pairs = [(made(**call).sample, model(**call).sample.detach()) for call in calls]
        assert max(float((a - b).norm() / b.norm()) for a, b in pairs) < 1e-12
    assert 2 <= changed[2] < changed[1]


def test_without_calibration_nothing_can_be_decided() -> None:
    with pytest.raises(CalibrationError, match="no calibration statistics"):
        rewritten(AdaLN(), "balance-channels", planned(q=Q, time=TIME), **adaln())


def test_factors_that_do_not_fit_the_dtype_are_refused() -> None:
    plan = decided()
    plan.vectors["q"] = FACTORS * 1e300
    with pytest.raises(NonFiniteError, match=r"q.weight does not fit torch.float32 after balance-channels"):
        rewritten(AdaLN(), "balance-channels", plan, **adaln())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exponent": 1.5}, "exponent 1.5 is not between 0 and 1"),
        ({"salient": 0.5}, "salient 0.5 is not a ratio of 1 or more"),
        ({"dearest": "gold"}, "'gold' is not a cost"),
        ({"roles": "block+attention"}, "attention is not a role"),
    ],
)
def test_bad_options_are_refused_at_once(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        BalanceChannels(**options)  # type: ignore[arg-type]


class TestSalience:
    activation = np.array([[1.0, 2.0, 9.0], [6.0, 2.0, 1.0]])
    weight = np.array([1.0, 2.0, 3.0])

    def test_timesteps_that_disagree_with_the_weight_count_more(self) -> None:
        first, second = spearman_weights(self.activation, self.weight)  # Correlations 1 and -1.
        assert second / first == pytest.approx(np.e**2)
        assert first + second == pytest.approx(1)
        combined = combine_timesteps(self.activation, self.weight, Salience.SPEARMAN)
        np.testing.assert_allclose(combined, first * self.activation[0] + second * self.activation[1])

    def test_without_an_order_all_count_the_same(self) -> None:
        np.testing.assert_allclose(spearman_weights(self.activation, np.ones(3)), [0.5, 0.5])
        assert np.isfinite(spearman_weights(np.ones((2, 3)), self.weight)).all()

    def test_mean_and_max(self) -> None:
        assert combine_timesteps(self.activation, self.weight, Salience.MEAN).tolist() == [3.5, 2, 5]
        assert combine_timesteps(self.activation, self.weight, Salience.MAX).tolist() == [6, 2, 9]

    def test_half_makes_both_sides_equal(self) -> None:
        x, w = np.array([4.0, 9.0]), np.array([1.0, 4.0])
        b = balance_factor(x, w, 0.5)
        np.testing.assert_allclose(x / b, w * b)

    def test_dead_channels_keep_factor_one(self) -> None:
        assert balance_factor(np.array([0.0, 3.0]), np.array([2.0, 0.0]), 0.5).tolist() == [1, 1]
