"""What passes know of a layer's input is what the layer reads, whatever was done to the input and in which order."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, fx, nn

import fxquant
from fxquant.ir.meta import LAYER
from fxquant.planning.context import PassContext
from fxquant.planning.decisions import LayerPlan, Shift, TimestepGroups
from fxquant.planning.layer_inputs import layer_input, moments
from fxquant.planning.plan import Plan
from fxquant.statistics.collection import Statistics
from tests import tiny

STEPS = (100.0, 400.0, 900.0)
B = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)
Z = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.0, -1.0]], dtype=torch.float64)


@functools.cache
def rows(step: float) -> Tensor:
    return torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(int(step))) * 3


@pytest.mark.parametrize("balanced", [False, True])
def test_the_order_of_shift_and_balance_is_kept(balanced: bool) -> None:
    plan, statistics = Plan("", "", "timestep"), Statistics(num_rows=10)
    statistics.wants_moments = {"q"}.__contains__
    for step in STEPS:
        statistics.record("q", rows(step), torch.tensor(step))
    layer = LayerPlan("linear", "block", [4, 3], 8, 8, shift=Shift("free", balanced=balanced))
    layer.timesteps = TimestepGroups([500.0])
    plan.layers["q"], plan.vectors["q"], plan.vectors["q.shift"] = layer, B, Z
    context = PassContext(plan, statistics)

    def read(step: float) -> Tensor:
        x, z = rows(step).double().flatten(0, 1), Z[int(step > 500)]
        return x / B - z if balanced else (x - z) / B

    seen = layer_input(context, "q")
    for number, step in enumerate(STEPS):
        torch.testing.assert_close(seen.minimum[number], read(step).amin(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(seen.maximum[number], read(step).amax(0), rtol=1e-12, atol=1e-12)
        assert torch.allclose(seen.rows[number].double().sum(0), read(step).sum(0), atol=1e-4)
    together = torch.cat([read(step) for step in STEPS])
    torch.testing.assert_close(moments(context, "q"), together.T @ together / len(together), rtol=1e-5, atol=1e-4)


class Watch(fx.Interpreter):
    """Notes between which values the inputs of linears lie."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.bounds: dict[str, list[float]] = {}

    def run_node(self, n: fx.Node) -> object:
        if n.target is torch.ops.aten.linear.default:
            low, high = (float(end) for end in torch.aminmax(self.env[n.args[0]]))  # type: ignore[index]
            old = self.bounds.setdefault(n.meta[LAYER], [low, high])
            self.bounds[n.meta[LAYER]] = [min(old[0], low), max(old[1], high)]
        return super().run_node(n)


PREPARE = "remove-no-ops,assign-precision{precision=w8a8} ; "
SHIFT = "group-timesteps{groups=2},shift-channels,absorb-shifts"
BALANCE = "balance-channels,absorb-affines"


@pytest.mark.slow
@pytest.mark.parametrize("order", [f"{SHIFT},{BALANCE}", f"{BALANCE},{SHIFT}"])
def test_ranges_are_those_of_what_layers_read(order: str) -> None:
    model = tiny.make_dit().double()
    calls = [
        {name: value.double() if value.is_floating_point() else value for name, value in tiny.inputs(2, step).items()}
        for step in STEPS
    ]

    def calibrate() -> None:
        for call in calls:
            model(**call)

    def compiled(recipe: str) -> nn.Module:
        chosen = fxquant.Recipe.parse(PREPARE + recipe)
        return fxquant.compile(model, recipe=chosen, calibrate=calibrate, measure=0)

    rewritten, plan = compiled(order), compiled(f"{order},quantize-linears").plan
    assert any(layer.shift and layer.shift.channels for layer in plan.layers.values())
    watch = Watch(rewritten.graphs[0])
    with torch.no_grad():
        for call in calls:
            watch.run(*call.values())
            torch.testing.assert_close(rewritten(**call).sample, model(**call).sample, rtol=1e-11, atol=1e-11)
    for name, layer in plan.layers.items():
        if layer.activation is not None:
            ends = [layer.activation.low, layer.activation.high]
            low, high = (end if isinstance(end, list) else [end] for end in ends)
            known = min(0.0, watch.bounds[name][0]), max(0.0, watch.bounds[name][1])
            # Ranges of bins reach one timestep further, so that the widest of them may be wider than any value.
            assert min(low) <= known[0] + 1e-5 * (known[1] - known[0]), name
            assert max(high) >= known[1] - 1e-5 * (known[1] - known[0]), name
            assert max(high) - min(low) < 1.5 * (known[1] - known[0]), name
