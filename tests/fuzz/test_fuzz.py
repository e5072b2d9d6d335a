"""Balancing and shifting of random graphs: whatever the walk grants, the outputs stay what they were, in float64.

``FXQUANT_FUZZ=20000`` in the environment sets the number of graphs; ``make fuzz`` does.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st

from fxquant.calibrate import copy_graph
from fxquant.errors import CalibrationError
from fxquant.ir.ops import recording
from fxquant.observers import Statistics
from fxquant.pipeline import Pipeline
from fxquant.plan import Plan
from tests.fuzz.graphs import Builder, graphs
from tests.support import outputs, relative_error

EXAMPLES = int(os.environ.get("FXQUANT_FUZZ", "500"))
STEPS = (900.0, 500.0, 100.0)

balancing = st.builds(
    "balance-channels{{salience={} dearest={}}},absorb-affines".format,
    st.sampled_from(["spearman", "max", "moving-average"]),
    st.sampled_from(["free", "vector", "tokens"]),
)
shifting = st.builds(
    "group-timesteps{{groups={}}},shift-channels{{dearest={}}},absorb-shifts,".format,
    st.integers(1, 3),
    st.sampled_from(["free", "vector"]),
)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="FXQUANT_FUZZ" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
@given(graphs(), st.one_of(balancing, st.builds(str.__add__, shifting, balancing)))
def test_rewritten_graphs_compute_the_same(builder: Builder, passes: str) -> None:
    module = builder.module
    note(str(module.graph))
    note(passes)
    inputs = [builder.inputs(step) for step in STEPS]
    expected = [outputs(module, *tensors) for tensors in inputs]
    assume(
        all(bool(torch.isfinite(x).all()) and float(x.abs().max()) < 1e6 for xs in expected for x in xs if x.numel())
    )
    rewrite(module, inputs, passes)
    actual = [outputs(module, *tensors) for tensors in inputs]
    for left, right in zip(actual, expected, strict=True):
        assert relative_error([a for a in left if a.numel()], [e for e in right if e.numel()]) < 1e-8


def rewrite(module: Any, inputs: list[list[torch.Tensor]], passes: str) -> Plan:
    """Calibrate a graph and run passes on it."""
    plan = Plan("", "", "timestep")
    Pipeline.parse("remove-no-ops,assign-precision").run(module, plan)
    observed, plan.statistics = copy_graph(module), Statistics(num_rows=8)
    Pipeline.parse("insert-observers").run(observed, plan)
    try:
        with recording(plan.statistics.record), torch.no_grad():
            for tensors in inputs:
                observed(*copy.copy(tensors))
    except CalibrationError:
        assume(False)  # Not a graph of one timestep a sample: an observer says so.
    Pipeline.parse(passes).run(module, plan)
    return plan
