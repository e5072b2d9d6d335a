"""Graphs that were once rewritten wrongly, as fuzzing found them."""

from __future__ import annotations

import pytest

from tests.fuzz.graphs import BATCH, CHANNELS, TOKENS, Builder
from tests.fuzz.test_fuzz import STEPS, rewrite
from tests.support import outputs, relative_error


def check(b: Builder, passes: str) -> None:
    """Rewritten, the graph computes the same."""
    module = b.finish()
    inputs = [b.inputs(step) for step in STEPS]
    expected = [outputs(module, *tensors) for tensors in inputs]
    rewrite(module, inputs, passes)
    for tensors, right in zip(inputs, expected, strict=True):
        assert relative_error(outputs(module, *tensors), right) < 1e-10


@pytest.mark.parametrize("groups", [1, 2])
def test_a_linear_that_reads_a_linear_whose_input_was_shifted(groups: int) -> None:
    # The second shift went to the output of the first linear, which nobody read any more.
    b = Builder(0)
    sample = b.input("sample", BATCH, TOKENS, CHANNELS)
    b.input("timestep", BATCH)
    b.linear(b.linear(b.linear(sample, CHANNELS), CHANNELS), 4, bias=False)
    check(b, f"group-timesteps{{groups={groups}}},shift-channels,absorb-shifts")
