"""Random valid graphs of the ops that have channel rules, for the proof by fuzzing.

Values have two to five axes; the first is mostly the batch. No attempt is made to draw meaningful graphs: any number of
ops may read a value or parameter, layouts are unusual, parts are dropped, and many requests cannot be granted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

import torch

from tests.fuzz import blocks, elementwise, layouts
from tests.fuzz.builder import BATCH, CHANNELS, TOKENS, Builder, shape

aten = torch.ops.aten

STEPS = [*blocks.STEPS, *elementwise.STEPS, *layouts.STEPS]

LARGEST = 600
"""The most elements of a value that further ops read."""


def build(first: int, steps: Sequence[int], last: int) -> Builder:
    """A finished graph with its builder.

    Inputs are ``sample`` [2, 3, 8] and ``timestep``, and possibly ``text`` [2, 4, 6], ``mask`` [2, 24] and
    ``strength``, one number or one per sample.

    Args:
        first: Seed of the inputs and of the numbers in parameters.
        steps: Seed of each step.
        last: Seed of the last linears and of the additional output.
    """
    b, r = Builder(first), Random(first)
    sample = b.input("sample", BATCH, TOKENS, CHANNELS)
    size = r.choice([(BATCH,), (BATCH,), (BATCH,), (1,), ()])
    time = b.input("timestep", *size, dtype=r.choice([torch.float64, torch.int64]))
    b.values.append(sample)
    if r.random() < 1 / 4:
        b.values.append(b.input("text", BATCH, 4, 6))
    if r.random() < 1 / 3:
        b.mask = b.input("mask", BATCH, 24, dtype=torch.bool)
    strength = b.input("strength", *r.choice([(), (BATCH,)])) if r.random() < 1 / 4 else None
    seconds = b.call(aten.mul.Tensor, b.call(aten.to.dtype, time, torch.float64), 0.01)
    column = b.call(aten.reshape.default, seconds, [-1, 1])
    b.linear(b.linear(sample, CHANNELS), CHANNELS)
    b.linear(column, 4)
    if strength is not None:
        b.call(aten.mul.Tensor, b.call(aten.reshape.default, strength, [-1, 1]), column)
    for seed in steps:
        r = Random(seed)
        x = r.choice(b.values)
        if math.prod(shape(x)) <= LARGEST:
            r.choice(STEPS)(b, r, x)
    r = Random(last)
    for _ in range(r.randint(1, 4)):
        b.linear(r.choice([x for x in b.values if math.prod(shape(x)) <= LARGEST]), 4)
    b.finish(*([r.choice([*b.values, *b.parameters])] if r.random() < 1 / 5 else []))
    return b
