"""What branches of low rank cost at run time: processor time of a call with them, over that of the same call without.

    python -m benchmarks.branches --model dit:4 --recipe svdquant-w8a8,svdquant-w4a8 --pairs 25

A recipe with ``split-low-rank`` is compared with the same recipe without this pass, in one process and one thread. All
systems are called in turn, and each is called once, unmeasured, before its measured call. ``ratio`` is the median over
the rounds of the time of a system over that of the system without branches in the same round, with quartiles. Times are
of the processor, not of the clock, so other processes disturb them less; still they share its caches.

``fused`` is ``native`` as it is, ``separate`` is ``native{branches=separate}``, where each branch is an op of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

import fxquant
from benchmarks.figures import quartiles, write
from benchmarks.models import Task, task_of
from fxquant.backends.native import Native
from fxquant.pipeline.recipes import Recipe, make_recipe

_PASS = "split-low-rank"
_WITHOUT = "without"


@dataclass(frozen=True)
class Cost:
    """Processor time of a system.

    Attributes:
        recipe: The recipe, with branches.
        system: ``without``, ``fused`` or ``separate``, and how it is called.
        ms: Median of the milliseconds of a call.
        ratio: Median over rounds of the ratio to ``without``.
        low: Lower quartile of the ratios.
        high: Upper quartile of the ratios.
    """

    recipe: str
    system: str
    ms: float
    ratio: float
    low: float
    high: float


def main() -> None:
    options = _parser().parse_args()
    torch.set_num_threads(1)
    task, costs = task_of(options.model, options.batch), []
    print(f"{task.name}, rank {options.rank}, one thread, {options.pairs} rounds\n\n{_line()}", flush=True)
    for recipe in options.recipe.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            folder = options.checkpoints / recipe if options.checkpoints else Path(scratch)
            _prepare(task, make_recipe(recipe), options.rank, folder)
            for compiled in {"eager": [False], "compiled": [True], "both": [False, True]}[options.mode]:
                for cost in measured(task, recipe, folder, compiled, options.pairs):
                    print(_line(cost), flush=True)
                    costs.append(cost)
    if options.json:
        write(options.json, json.dumps([asdict(cost) for cost in costs], indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.branches", description="Measure the processor time that branches of low rank take."
    )
    parser.add_argument("--model", default="dit:4", help="the model, NAME or NAME:LAYERS; default dit:4")
    parser.add_argument("--recipe", default="svdquant-w8a8,svdquant-w4a8", help="recipes with branches, by commas")
    parser.add_argument("--rank", type=int, default=32, help="rank of the branches")
    parser.add_argument("--batch", type=int, default=2, help="samples per call, an even number")
    parser.add_argument("--pairs", type=int, default=25, help="measured calls of each system, interleaved")
    parser.add_argument("--mode", choices=("eager", "compiled", "both"), default="both", help="call with torch.compile")
    parser.add_argument("--checkpoints", type=Path, help="folder that keeps the quantized models for the next run")
    parser.add_argument("--json", type=Path, help="file for all measurements")
    return parser


def without_branches(recipe: Recipe) -> Recipe:
    """The recipe without ``split-low-rank``."""
    prepare, convert = (
        tuple(step for step in steps if step.name != _PASS) for steps in (recipe.prepare, recipe.convert)
    )
    return Recipe(prepare, convert)


def _prepare(task: Task, recipe: Recipe, rank: int, folder: Path) -> None:
    """Save the model with and without branches, unless the folder has both."""
    # Fitting a branch again does not change its shapes, and takes longest.
    recipes = {f"rank-{rank}": recipe.with_options(_PASS, rank=rank, iterations=0), _WITHOUT: without_branches(recipe)}
    for name, chosen in recipes.items():
        if (folder / name).exists():
            continue
        model = task.model()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of random weights and few timesteps.
            made = fxquant.compile(model, recipe=chosen, calibrate=_calibration(task, model), measure=0)
        fxquant.save(made, folder / name)


def _calibration(task: Task, model: nn.Module) -> Callable[[], None]:
    return lambda: task.calibrate(model)


def measured(task: Task, recipe: str, folder: Path, compiled: bool, rounds: int) -> Iterator[Cost]:
    """Load all systems of a recipe and call them in turn."""
    branched = next(path for path in folder.iterdir() if path.name != _WITHOUT)
    systems = {
        _WITHOUT: fxquant.load(folder / _WITHOUT, backend=Native()),
        "fused": fxquant.load(branched, backend=Native()),
        "separate": fxquant.load(branched, backend=Native(branches="separate")),
    }
    calls = {name: torch.compile(model) if compiled else model for name, model in systems.items()}
    with torch.no_grad():
        times = interleaved({name: partial(call, **task.timed) for name, call in calls.items()}, rounds)
    for name, seconds in times.items():
        ratios = [own / plain for own, plain in zip(seconds, times[_WITHOUT], strict=True)]
        said = f"{name}, {'compiled' if compiled else 'eager'}"
        yield Cost(recipe, said, 1e3 * statistics.median(seconds), statistics.median(ratios), *quartiles(ratios))


def interleaved(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of processor time of each call in each round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()  # Unmeasured, because the other systems changed the caches.
            began = time.process_time()
            call()
            times[name].append(time.process_time() - began)
    return times


def _line(cost: Cost | None = None) -> str:
    """A row of the table, or its head."""
    if cost is None:
        return "| recipe | system | ms of processor time | ratio | quartiles |\n|---|---|---|---|---|"
    return f"| {cost.recipe} | {cost.system} | {cost.ms:.1f} | {cost.ratio:.3f} | {cost.low:.3f} to {cost.high:.3f} |"


if __name__ == "__main__":
    main()
