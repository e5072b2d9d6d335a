"""What a measurement in steps does, in order: the most important first.

Steps with a cap run for that many seconds in all runs together. What is left of them then comes after the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.gpu.ledger import Entry, latest, seconds_of

KERNELS = ("tests/backends/native/gpu",)
FEW = (
    "test_device.py",
    "test_machine.py",
    "test_kernels.py::test_row_sums",
    "test_kernels.py::test_no_tokens",
)
"""What a rehearsal runs of them."""
OTHERS = (
    "tests/backends/torchao",
    "tests/ir/test_ops.py",
    "tests/statistics/test_statistics.py",
    "tests/test_api.py",
    "tests/cli/test_cli.py",
)


@dataclass(frozen=True)
class Task:
    """A model at a batch size.

    Attributes:
        name: Name in the results, such as ``DiT-XL/2, batch 16``.
        model: Model as for :func:`benchmarks.models.task_of`.
        batch: Samples per call.
        blocks: Whether blocks are compiled once for all, which takes a fraction of the time of the whole graph.
        most: Number of quantized models to measure, the first ones of the list; None for all.
        plain: Whether quantized models are also called without CUDA graphs.
    """

    name: str
    model: str
    batch: int
    blocks: bool
    most: int | None = None
    plain: bool = True


@dataclass(frozen=True)
class Step:
    """A part of the measurement, with a process of its own.

    Attributes:
        name: Name in the results.
        kind: ``tests``, ``tune`` or ``models``.
        cap: Seconds after which later steps come first.
        tasks: Models of the steps ``tune`` and ``models``.
        paths: Files and folders of the step ``tests``.
    """

    name: str
    kind: str
    cap: float | None = None
    tasks: tuple[Task, ...] = ()
    paths: tuple[str, ...] = ()


DIT_16, FLUX, DIT_2 = "DiT-XL/2, batch 16", "FLUX block pair, batch 1", "DiT-XL/2, batch 2"
TASKS = (
    Task(DIT_16, "dit", 16, blocks=True),
    Task(FLUX, "flux:1+1", 1, blocks=False),
    Task(DIT_2, "dit", 2, blocks=True),
)
REHEARSED = (
    Task(DIT_16, "tiny:1", 4, blocks=False, plain=False),
    Task(FLUX, "tiny-flux", 1, blocks=False, most=2, plain=False),
    Task(DIT_2, "tiny:2", 2, blocks=True, most=1, plain=False),
)
"""Small models in place of the measured ones."""
WHOLE = "DiT-XL/2, batch 16, compiled as a whole"


def agenda(rehearse: bool) -> list[Step]:
    """The steps in order.

    Args:
        rehearse: Whether small models and a few tests take the place of the real ones.
    """
    tasks = REHEARSED if rehearse else TASKS
    whole = Task(WHOLE, tasks[0].model, tasks[0].batch, blocks=False, most=2)
    kernels = tuple(f"{KERNELS[0]}/{name}" for name in FEW) if rehearse else KERNELS
    slower = 4.0 if rehearse else 1.0
    steps = [
        Step("tests of kernels", "tests", 80.0 * slower, paths=kernels),
        Step("tuning", "tune", 60.0 * slower, tasks=tasks),
        Step("models", "models", tasks=tasks),
        Step("other device tests", "tests", paths=OTHERS[1:3] if rehearse else OTHERS),
    ]
    return steps if rehearse else [*steps, Step("whole graphs", "models", tasks=(whole,))]


def next_step(steps: Sequence[Step], entries: Sequence[Entry], tried: Sequence[str] = ()) -> tuple[Step, float] | None:
    """The step to run now and the most seconds for it; None if all are finished.

    Args:
        steps: The steps in order.
        entries: The results so far, of all runs.
        tried: Names of steps that are not run again in this run.
    """
    states = latest(entries, "step")
    open_steps = [
        step
        for step in steps
        if states.get(step.name, {}).get("state") != "finished" and step.name not in tried
    ]  # fmt: skip
    for step in open_steps:
        left = float("inf") if step.cap is None else step.cap - seconds_of(entries, step.name)
        if left > 0:
            return step, left
    return (open_steps[0], float("inf")) if open_steps else None
