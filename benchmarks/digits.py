"""The trained model of examples/digits as a task, which makes the errors of a system visible."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import Task
from benchmarks.shapes import Call
from examples.digits.compare import CALIBRATION_STEPS, TEST_SAMPLES, TEST_STEPS
from examples.digits.generator import GUIDANCE, generate, load_pipeline
from fxquant.numerics.sqnr import sqnr_db

_CALIBRATION_SEED, _TEST_SEED = 1_001, 1_000


def digits_task() -> Task:
    """The task; every call has 16 samples, with and without their condition."""
    pipe = load_pipeline()
    calls = _recorded(pipe, _CALIBRATION_SEED, CALIBRATION_STEPS)
    tests = _recorded(pipe, _TEST_SEED, TEST_STEPS)
    make = partial(copy.deepcopy, pipe.transformer)
    return Task("digits", make, make, calls, tests[0], tuple(tests))


def _recorded(pipe: Any, seed: int, steps: int) -> list[Call]:
    calls: list[Call] = []

    def record(_: Any, args: tuple[Tensor, ...], kwargs: Call) -> None:
        calls.append({"hidden_states": args[0], **kwargs, "return_dict": False})

    hook = pipe.transformer.register_forward_pre_hook(record, with_kwargs=True)
    try:
        generate(pipe, [number % 10 for number in range(TEST_SAMPLES)], seed=seed, steps=steps, guidance=GUIDANCE)
    finally:
        hook.remove()
    return calls


@torch.no_grad()
def mean_sqnr(task: Task, run: Callable[[Call], Tensor]) -> float:
    """SQNR in dB against float, averaged over the test calls."""
    model = task.model()
    return statistics.fmean(sqnr_db(model(**call)[0], run(call).float()) for call in task.tests)
