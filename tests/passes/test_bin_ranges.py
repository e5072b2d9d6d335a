"""Bins of timesteps for ranges of inputs."""

from __future__ import annotations

import pytest
import torch

import fxquant
from fxquant.errors import ConfigurationError, MissingTimestepError
from fxquant.inspect.explain import explain
from fxquant.passes.bin_ranges import BinRanges
from fxquant.pipeline.pipeline import parse_pass
from fxquant.planning.context import PassContext
from fxquant.planning.decisions import ActivationRange, TimestepGroups
from fxquant.planning.plan import Plan
from fxquant.statistics.collection import Statistics
from tests.passes.models import TIMED, Timed, planned, seen, timed
from tests.support import rewritten
from tests.tiny import STEPS, calibrate, make_dit

RANGES = {900.0: (-8, 4), 800.0: (-7, 4), 500.0: (-1, 1), 100.0: (-1, 0.9)}
"""Timesteps, and the ends of the range of q's input: two widths, a factor of about 8 and 4 apart."""


def context() -> PassContext:
    made = PassContext(planned(**TIMED))
    for layer in made.plan.layers.values():
        layer.activation = None
    for name in ("q", "out"):
        ends = RANGES if name == "q" else dict.fromkeys(RANGES, (-2, 2))
        seen(made, name, {step: [pair, (0, 0), (-0.5, 0.5), (0, 0)] for step, pair in ends.items()})
    made.plan.layers["q"].observed = made.plan.layers["k"].observed = "q"
    return made


def binned(options: str, given: PassContext | None = None) -> Plan:
    """The plan after the pass, which leaves the graph as it is."""
    given = given or context()
    before, after = rewritten(Timed(), f"bin-ranges{{{options}}}", given, **timed())
    assert after == before
    return given.plan


def test_bins_follow_the_width_of_the_range() -> None:
    plan = binned("bins=2")
    assert plan.layers["q"].timesteps == TimestepGroups([650.0])
    assert plan.layers["k"].timesteps is plan.layers["q"].timesteps  # Which reads the same value.
    assert plan.layers["time"].timesteps is None  # Its input stays float.


def test_distances_are_those_of_logarithms() -> None:
    """1 to 2 is as far as 4 to 8. Linear distances would join the three smallest and leave 8 alone."""
    made = context()
    made.statistics = Statistics(num_rows=4)
    widths = {900.0: 8.0, 800.0: 7.0, 500.0: 2.0, 100.0: 1.0}
    for name in ("q", "out"):
        seen(made, name, {step: [(-width, width)] * 4 for step, width in widths.items()})
    assert binned("bins=3", made).layers["q"].boundaries == (300.0, 650.0)


def test_one_range_per_bin() -> None:
    made = context()
    rewritten(Timed(), "bin-ranges{bins=2},quantize-linears", made, **timed())
    found = made.plan.layers["q"].activation
    assert found is not None
    # Each bin also covers its nearest neighbour, because another schedule has timesteps up to the boundary.
    assert found.low == [-7.0, -8.0] and found.high == [4.0, 4.0]


def test_never_more_bins_than_timesteps() -> None:
    assert binned("bins=25").layers["q"].boundaries == (300.0, 650.0, 850.0)


def test_bins_and_ranges_that_are_decided_are_kept() -> None:
    made = context()
    kept = TimestepGroups([400.0])
    made.plan.layers["q"].timesteps = kept
    made.plan.layers["k"].activation = ActivationRange(-1.0, 1.0, "minmax")
    plan = binned("bins=2", made)
    assert plan.layers["q"].timesteps is kept and plan.layers["k"].timesteps is None
    assert plan.layers["out"].boundaries != ()


def test_one_timestep_makes_one_bin_and_says_why() -> None:
    made = context()
    made.statistics = Statistics(num_rows=4)
    for name in ("q", "out"):
        seen(made, name, {500.0: [(-1, 1)] * 4})
    groups = binned("", made).layers["q"].timesteps
    assert groups == TimestepGroups([], reason="calibration saw one timestep")


def test_a_timestep_per_token_makes_one_bin_and_says_why() -> None:
    example = {**timed(), "timestep": torch.zeros(2, 3)}

    class Tokens(Timed):
        def forward(self, x: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return super().forward(x, timestep[:, 0], text)

    made = context()
    rewritten(Tokens(), "bin-ranges{bins=2}", made, **example)
    groups = made.plan.layers["q"].timesteps
    assert groups is not None and groups.boundaries == [] and "not one number a sample" in str(groups.reason)


def test_a_model_without_a_timestep_is_refused() -> None:
    made = context()
    made.plan.timestep = None
    with pytest.raises(MissingTimestepError, match="no timestep"):
        binned("", made)


def test_without_statistics_nothing_is_decided() -> None:
    made = context()
    made.statistics = None
    assert binned("", made).layers["q"].timesteps is None


@pytest.mark.parametrize("bins", [0, -3])
def test_bins_that_are_not_possible(bins: int) -> None:
    with pytest.raises(ConfigurationError, match=f"{bins} bins"):
        parse_pass(f"bin-ranges{{bins={bins}}}")
    assert BinRanges(1).bins == 1


RECIPE = "remove-no-ops,assign-precision{precision=w8a8} ; bin-ranges{bins=3},quantize-linears,quantize-embeddings"


def test_bins_lower_the_error_of_inputs_that_grow_with_time_and_survive_a_replay() -> None:
    model = make_dit()
    statistics = Statistics(keep_calls=6)
    plain = fxquant.compile(model, recipe="rtn-w8a8", calibrate=calibrate(model), statistics=statistics)
    made = fxquant.compile(model, recipe=fxquant.Recipe.parse(RECIPE), statistics=statistics)
    assert plain.plan is not None and made.plan is not None
    layers = {name: layer for name, layer in made.plan.layers.items() if layer.timesteps is not None}
    assert {len(layer.boundaries) for layer in layers.values()} == {len(STEPS) - 1}
    better = [layer.activation_sqnr_db > plain.plan.layers[name].activation_sqnr_db for name, layer in layers.items()]
    assert sum(better) > len(better) / 2
    again = fxquant.compile(model, plan=made.plan)
    assert again.plan == made.plan or [*again.plan.layers.values()] == [*made.plan.layers.values()]
    assert "bin-ranges{bins=3}" in str(explain(made, next(iter(layers))))
