"""Random valid graphs of the ops that have channel rules, for the proof by fuzzing.

Values have between two and five axes, the first of which mostly is the batch. Nothing is tried to make a graph
sensible: values and parameters are read by any number of others, layouts are odd, parts are dropped, and many a
request dies in a dead end.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st

from tests.fuzz import blocks, elementwise, layouts
from tests.fuzz.builder import BATCH, CHANNELS, TOKENS, Builder, shape

aten = torch.ops.aten

STEPS = [*blocks.STEPS, *elementwise.STEPS, *layouts.STEPS]

LARGEST = 600
"""Elements of the largest value that anything more is done with."""


@st.composite
def graphs(draw: Any) -> Builder:
    """A finished graph with its builder: inputs ``sample`` [2, 3, 8], ``timestep`` and maybe ``text`` [2, 4, 6]."""
    b = Builder(draw(st.integers(0, 2**16)))
    sample = b.input("sample", BATCH, TOKENS, CHANNELS)
    size = draw(st.sampled_from([(BATCH,), (BATCH,), (BATCH,), (1,), ()]))
    time = b.input("timestep", *size, dtype=draw(st.sampled_from([torch.float64, torch.int64])))
    b.values.append(sample)
    if draw(st.integers(0, 3)) == 0:
        b.values.append(b.input("text", BATCH, 4, 6))
    seconds = b.call(aten.mul.Tensor, b.call(aten.to.dtype, time, torch.float64), 0.01)
    column = b.call(aten.reshape.default, seconds, [-1, 1])
    b.linear(b.linear(sample, CHANNELS), CHANNELS)
    b.linear(column, 4)
    for _ in range(draw(st.integers(1, 14))):
        x = draw(st.sampled_from(b.values))
        if math.prod(shape(x)) <= LARGEST:
            draw(st.sampled_from(STEPS))(b, draw, x)
    for _ in range(draw(st.integers(1, 4))):
        b.linear(draw(st.sampled_from([x for x in b.values if math.prod(shape(x)) <= LARGEST])), 4)
    also = [draw(st.sampled_from([*b.values, *b.parameters]))] if draw(st.integers(0, 4)) == 0 else []
    b.finish(*also)
    return b
