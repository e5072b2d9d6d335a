"""Graphs, found by fuzzing, that were once rewritten incorrectly or not at all."""

from __future__ import annotations

import pytest
import torch

from tests.fuzz.builder import BATCH, CHANNELS, TOKENS, Builder, aten, shape
from tests.fuzz.proof import prove

EVERYTHING = "roles=block+adaln+embedder+patch+final"
BALANCE = f"balance-channels{{{EVERYTHING}}},absorb-affines"


def shift(groups: int, options: str = "roles=block") -> str:
    """Passes that shift channels."""
    return f"group-timesteps{{groups={groups} {options}}},shift-channels{{{options}}},absorb-shifts"


def started(*timestep: int) -> Builder:
    """A builder with the inputs sample and timestep."""
    b = Builder(0)
    b.values.append(b.input("sample", BATCH, TOKENS, CHANNELS))
    b.input("timestep", *timestep)
    return b


# --- wrong results ---


@pytest.mark.parametrize("groups", [1, 2])
def test_a_linear_that_reads_a_linear_whose_input_was_shifted(groups: int) -> None:
    # The second shift was applied to the output of the first linear, which no op read any more.
    b = started(BATCH)
    b.linear(b.linear(b.linear(b.values[0], CHANNELS), CHANNELS), 4, bias=False)
    b.finish()
    prove(b, shift(groups))


def test_a_constant_shift_of_a_linear_whose_bias_is_computed() -> None:
    # The shift of the bias was added to the parameter that the bias is computed from, on the wrong side of a neg.
    b = started(BATCH)
    b.apply(b.linear(b.values[0], CHANNELS), b.parameter(4, CHANNELS), b.call(aten.neg.default, b.parameter(4)))
    b.finish()
    prove(b, shift(1))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", ["expand", "roll", "permute"])
def test_samples_that_change_places(groups: int, kind: str) -> None:
    # An axis as long as the batch came first, or the samples were reordered: samples were shifted by rows of others.
    b = started(BATCH)
    x = b.linear(b.values[0], CHANNELS)
    if kind == "expand":
        x = b.call(aten.expand.default, x, [BATCH, *shape(x)])
    elif kind == "roll":
        x = b.call(aten.roll.default, x, [1], [0])
    else:
        x = b.call(aten.permute.default, b.call(aten.unflatten.int, x, -1, [BATCH, -1]), [2, 1, 0, 3])
    b.linear(x, 4)
    b.finish()
    prove(b, shift(groups))


# --- crashes ---


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("cast", [aten._to_copy.default, aten.neg.default])
def test_a_bias_that_is_read_through_something(groups: int, cast: object) -> None:
    # With several bins this failed an assertion. With one bin, a second run did not recognize the shifted bias.
    b = started(BATCH)
    bias = b.call(cast, b.parameter(4), **({"dtype": torch.float64} if cast is aten._to_copy.default else {}))
    b.apply(b.linear(b.values[0], CHANNELS), b.parameter(4, CHANNELS), bias)
    b.finish()
    prove(b, shift(groups))


@pytest.mark.parametrize("passes", [BALANCE, shift(2, EVERYTHING)])
def test_a_timestep_without_an_axis(passes: str) -> None:
    # A factor or a shift reached a scalar, which has no axis, and the code looked for its axis.
    b = started()
    number = b.call(aten.mul.Tensor, b.call(aten.to.dtype, b.module.graph.find_nodes(op="placeholder")[1],
                    torch.float64), 0.01)  # fmt: skip
    column = b.call(aten.reshape.default, number, [-1, 1])
    b.linear(b.linear(b.values[0], CHANNELS), CHANNELS)
    b.linear(column, 4)
    b.finish()
    prove(b, passes)


@pytest.mark.parametrize("groups", [1, 2])
def test_rows_that_are_added_after_a_cast(groups: int) -> None:
    # The tensor of the rows would have been named ``to.rows``, but ``to`` is a method of every module.
    b = started(BATCH)
    vector = b.linear(b.call(aten.reshape.default, b.module.graph.find_nodes(op="placeholder")[1], [-1, 1]), 4)
    cast = b.call(aten.to.dtype, b.call(aten.gelu.default, vector), torch.float64)
    b.linear(cast, 4)
    b.call(aten.sigmoid.default, cast)
    b.linear(b.values[0], 4)
    b.finish()
    prove(b, shift(groups, EVERYTHING), before="assign-precision{layers=all}")


def test_rows_that_are_added_to_an_input() -> None:
    # The rows were selected before the bins that select them.
    b = started(BATCH)
    vector = b.input("vector", BATCH, CHANNELS)
    b.linear(vector, 4)
    b.call(aten.sigmoid.default, vector)
    b.linear(b.linear(b.values[0], CHANNELS), 4)
    b.finish()
    prove(b, shift(2, EVERYTHING), before="assign-precision{layers=all}")


# --- a second run that does something again ---


def test_a_shift_that_was_absorbed_in_part() -> None:
    # Every run made the table of the remaining shift again, although it absorbed nothing more.
    b = started(BATCH)
    parts = b.call(
        aten.cat.default, [b.linear(b.values[0], 4), b.call(aten.tanh.default, b.linear(b.values[0], 4))], -1
    )
    b.linear(parts, 4)
    b.finish()
    prove(b, shift(2, "dearest=tokens roles=block"))
