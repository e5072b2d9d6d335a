"""One step of a measurement in steps, in a process of its own: ``python -m benchmarks.gpu.step NAME FOLDER``."""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.gpu.agenda import Task, agenda
from benchmarks.gpu.ledger import Ledger, end_with_parent, latest
from benchmarks.gpu.modes import Run
from benchmarks.gpu.products import Shape
from benchmarks.gpu.table import machine
from benchmarks.gpu.timing import ColdCaches
from benchmarks.gpu.tune import tune
from benchmarks.gpu.whole import measure_tasks
from benchmarks.models import linear_shapes, task_of
from fxquant.backends.native.gpu import machine as machines
from fxquant.backends.native.gpu.configs import Config

RESULTS, CONFIGS = "results.jsonl", "configs.json"
_RUNS = 10
"""Runs of a tiling, of which the median is taken."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.step")
    parser.add_argument("name")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--deadline", type=float, required=True, help="time.monotonic() after which nothing is begun")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    end_with_parent()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_grad_enabled(False)
    torch.set_float32_matmul_precision("high")  # As torchao sets it.
    step = next(step for step in agenda(options.rehearse) if step.name == options.name)
    device = torch.device("cpu" if options.rehearse else "cuda")
    ledger = Ledger(options.folder / RESULTS)
    ledger.add("machine", "machine", found=machine(device), rehearsed=options.rehearse)
    if step.kind == "tune":
        finished = _tune(step.tasks, ledger, device, options.folder / CONFIGS, options.deadline, options.rehearse)
    else:
        finished = measure_tasks(step.tasks, ledger, device, options.deadline, options.rehearse)
    if finished:
        ledger.add("step", step.name, state="finished")
    return 0


def shapes_of(tasks: Sequence[Task]) -> list[Shape]:
    """Shapes of the products of some models, those of the first model first, and of each those that take longest."""
    found: dict[Shape, None] = {}
    for task in tasks:
        counts = linear_shapes(task_of(task.model, task.batch))
        work = {shape: count * shape[0] * shape[1] * shape[2] for shape, count in counts.items()}
        found |= dict.fromkeys(sorted(work, key=lambda shape: (-work[shape], shape)))
    return list(found)


def _tune(
    tasks: Sequence[Task], ledger: Ledger, device: torch.device, out: Path, deadline: float, rehearse: bool
) -> bool:
    """Tune the shapes that earlier runs have not tuned, and return whether all are tuned."""

    def ended() -> bool:
        return time.monotonic() > deadline

    def tuned(entry: str, config: Config | None) -> None:
        ledger.add("tuned", entry, config=config and asdict(config))

    caches = None if rehearse else ColdCaches(device)

    def timer(run: Run) -> float:
        if caches is not None:
            return statistics.median(caches.seconds(run, _RUNS))
        began = time.perf_counter()
        run()
        return time.perf_counter() - began

    shapes = shapes_of(tasks)
    known = latest(ledger.read(), "tuned")
    tune(shapes[:1] if rehearse else shapes, device, machines.name(device), timer, out, known, tuned, ended)
    return not ended()


if __name__ == "__main__":
    if "--rehearse" in sys.argv:
        os.environ["TRITON_INTERPRET"] = "1"
    sys.exit(main())
