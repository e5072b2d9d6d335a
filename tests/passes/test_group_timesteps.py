from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import Tensor, nn

from fxquant.errors import CalibrationError, ConfigurationError, QualityWarning
from fxquant.inspect.report import report
from fxquant.passes.group_timesteps import Grouping, GroupTimesteps
from fxquant.pipeline.pipeline import Pipeline, parse_pass
from fxquant.planning.context import PassContext
from fxquant.planning.decisions import TimestepGroups
from fxquant.planning.plan import Plan
from fxquant.statistics.collection import Statistics
from tests.passes.models import TIMED, AdaLN, Timed, adaln, moving, planned, seen, timed
from tests.support import captured, rewritten


def grouped(options: str, context: PassContext | None = None) -> Plan:
    """The plan after the pass, which leaves the graph as it is."""
    context = context or moving()
    before, after = rewritten(Timed(), f"group-timesteps{{{options}}}", context, **timed())
    assert after == before
    return context.plan


def test_what_the_plan_says() -> None:
    plan = grouped("groups=2")
    # Means of the middles, first channel (the second moves half as much): 8, 7, 0, -4. Distances 1.25, 61.25, 20 make
    # {800, 900}; then 7.5 to 0 and 0 to -4, 70.3 and 20, make {100, 500}; 7.5 to -2 is left.
    groups = plan.layers["q"].timesteps
    assert groups is not None and groups.boundaries == [650.0] and groups.reason is None
    assert groups.dendrogram == [[800.0, 900.0, 1.25], [100.0, 500.0, 20.0], [100.0, 800.0, 9.5**2 * 1.25]]
    assert plan.layers["k"].timesteps is groups  # Which reads the same value.
    assert plan.layers["time"].timesteps is None


def test_three_groups_cut_the_same_dendrogram() -> None:
    two, three = grouped("groups=2"), grouped("groups=3")
    assert three.layers["q"].timesteps.dendrogram == two.layers["q"].timesteps.dendrogram
    assert three.layers["q"].boundaries == (300.0, 650.0)
    assert three.layers["q"].bins(torch.tensor([0, 300, 301, 650, 651, 999])).tolist() == [0, 0, 1, 1, 2, 2]


def test_a_tenth_by_default_is_one_group_here_and_says_why() -> None:
    with pytest.warns(
        QualityWarning, match=r"4 calibrated timesteps make one group.*11 or more steps.*groups=2"
    ) as said:
        plan = grouped("")
    assert len(said) == 1
    groups = plan.layers["q"].timesteps
    assert groups is not None and groups.boundaries == []
    assert groups.reason is not None and "a tenth of them, rounded up; 11 timesteps" in groups.reason
    assert "timesteps in one group, and why" in report(plan).table()


@pytest.mark.parametrize(("steps", "warned"), [(10, True), (11, False)])
def test_eleven_timesteps_make_two_groups(steps: int, warned: bool) -> None:
    context = moving()
    statistics = Statistics()
    for name in ("q", "out"):
        for step in range(steps):
            statistics.record(name, torch.full((1, 1, 4), float(step)), torch.tensor(step * 10.0))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        plan = grouped("", PassContext(context.plan, statistics))
    assert len(plan.layers["q"].boundaries) == (0 if warned else 1)
    assert [entry.category for entry in said] == [QualityWarning] * warned


def test_one_group_on_request_is_no_reason_to_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert grouped("groups=1").layers["q"].timesteps.reason is None


def test_greedy_and_optimal_part_ways() -> None:
    # Greedy merges 4 and 7 first, then that with 10.5, and is left with {0} {4, 7, 10.5}; the best halves are even.
    context = PassContext(planned(q=("linear", [4, 4], 8, 8, 0)))
    for step, middle in zip((100.0, 200.0, 300.0, 400.0), (0.0, 4.0, 7.0, 10.5), strict=True):
        seen(context, "q", {step: [(middle, middle)] * 4})
    found = {}
    for method in Grouping:
        own = planned(
            q=("linear", [4, 4], 8, 8, 0), k=("linear", [2, 4], 8, 8, 0), out=("linear", [3, 4], None, None, 0)
        )
        own.layers["time"] = planned(time=("linear", [8, 4], None, None, 0)).layers["time"]
        own.layers["k"].observed = "q"
        with_statistics = PassContext(own, context.statistics)
        found[method] = grouped(f"groups=2 method={method.value}", with_statistics).layers["q"].boundaries
    assert found == {Grouping.GREEDY: (150.0,), Grouping.OPTIMAL: (250.0,)}


def test_what_the_plan_says_already_stays() -> None:
    context = moving()
    for name in ("q", "k"):
        context.plan.layers[name].timesteps = TimestepGroups([123.0])
    grouped("groups=3", context)
    assert context.plan.layers["q"].boundaries == context.plan.layers["k"].boundaries == (123.0,)
    before = str(context.plan.layers)
    grouped("groups=2", context)
    assert str(context.plan.layers) == before


def test_layers_with_float_weights_or_of_other_roles_have_none() -> None:
    context = moving(out=("linear", [3, 4], None, None, 0))
    context.plan.layers["q"].role = context.plan.layers["k"].role = "final"
    grouped("groups=2", context)
    assert all(layer.timesteps is None for layer in context.plan.layers.values())


def test_a_timestep_that_is_not_one_number_a_sample_has_one_bin_and_a_reason() -> None:
    context = PassContext(planned(q=("linear", [4, 4], 8, 8, 0), time=("linear", [8, 4], None, None, 0)))
    seen(context, "q", {step: [(0.0, step)] * 4 for step in (1.0, 2.0, 3.0)})
    reason = "the timestep has shape [batch, 4], not one number a sample"
    with pytest.warns(QualityWarning, match=re.escape(f"{reason}, so all timesteps share one shift and one range")):
        rewritten(AdaLN(), "group-timesteps{groups=2}", context, **adaln())
    groups = context.plan.layers["q"].timesteps
    assert groups is not None and groups.boundaries == [] and groups.reason == reason


class Packed(nn.Module):
    """Tokens without a batch axis, and a timestep for some of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.v, self.q = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        values = self.v(x + timestep.mean()).view(5, 2, 2).unsqueeze(0).transpose(1, 2)
        return self.q(values.transpose(1, 2).squeeze(0).reshape(5, 4))


def test_tokens_that_lead_in_place_of_samples_share_one_bin() -> None:
    context = PassContext(planned(q=("linear", [4, 4], 8, 8, 0), v=("linear", [4, 4], None, None, 0)))
    seen(context, "q", {step: [(0.0, step)] * 4 for step in (1.0, 2.0, 3.0)})
    inputs = {"x": torch.randn(5, 4), "timestep": torch.zeros(3)}
    rewritten(Packed(), "group-timesteps{groups=2},shift-channels,absorb-shifts", context, **inputs)
    groups = context.plan.layers["q"].timesteps
    assert groups is not None and groups.boundaries == [] and groups.reason == "the leading axis is not the batch"
    assert context.plan.layers["q"].shift is not None


def test_what_cannot_be_grouped_changes_nothing() -> None:
    context = moving()
    with pytest.raises(ConfigurationError, match=r"5 groups.*saw 4.*at most as many"):
        grouped("groups=5", context)
    one = PassContext(planned(**TIMED))
    for name in ("q", "out"):
        seen(one, name, {500.0: [(0.0, 1.0)] * 4})
    one.plan.layers["k"].observed = "q"
    with pytest.raises(CalibrationError, match="one timestep only"):
        grouped("groups=1", one)
    for failed in (context, one):
        assert all(layer.timesteps is None for layer in failed.plan.layers.values())


def test_without_calibration_nothing_can_be_decided() -> None:
    context = PassContext(moving().plan)
    with pytest.raises(CalibrationError, match="no calibration statistics"):
        grouped("groups=2", context)


def test_options_round_trip_and_bad_ones_are_refused_at_once() -> None:
    step = GroupTimesteps(groups=7, method=Grouping.OPTIMAL, roles="block+final", dearest="free")
    assert parse_pass(str(step)) == step
    assert str(step) == "group-timesteps{groups=7 method=optimal roles=block+final dearest=free}"
    for options, message in {
        "groups=-1": "-1 groups of timesteps are not possible",
        "dearest=gold": "'gold' is not a cost",
        "roles=attention": "attention is not a role",
        "method=best": "greedy, optimal",
    }.items():
        with pytest.raises(ConfigurationError, match=message):
            parse_pass(f"group-timesteps{{{options}}}")


def test_calibration_in_any_order() -> None:
    context = moving()
    backwards = PassContext(planned())
    for name in ("q", "out"):
        held = context.statistics[name]
        for i, step in reversed([*enumerate(held.timesteps.tolist())]):
            seen(backwards, name, {step: torch.stack([held.minimum[i], held.maximum[i]], dim=1).tolist()})
    again = PassContext(moving().plan, backwards.statistics)
    Pipeline.parse("group-timesteps{groups=3}").run(captured(Timed(), **timed()).module, again)
    assert again.plan.layers["q"].timesteps == grouped("groups=3", context).layers["q"].timesteps
