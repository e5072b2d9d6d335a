"""Measure how much the model's output suffers from each layer in each precision that it could have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from types import NoneType
from typing import Any

from torch import nn

from fxquant.allocation.job import Job, Progress
from fxquant.allocation.prepared import prepare
from fxquant.capture.sharing import sharing_traces
from fxquant.capture.threads import without_autocast
from fxquant.disk.finished_work import working_in
from fxquant.errors import ConfigurationError, check_type
from fxquant.inspect.errors.schedule import wanted_calls
from fxquant.pipeline.recipes import Recipe
from fxquant.planning.sensitivities import Sensitivities
from fxquant.runtime.float_model import device_of
from fxquant.statistics.collection import Statistics

CANDIDATES = ("w4a8", "w5a8", "w6a8", "w8a8")
RECIPE = "smoothquant-search-gptq"


def sensitivity(
    model: nn.Module,
    *,
    recipe: str | Recipe = RECIPE,
    candidates: Sequence[str] = CANDIDATES,
    calibrate: Callable[[], Any] | None = None,
    statistics: Statistics | None = None,
    layers: str = "default",
    timestep: str | None = "timestep",
    timesteps: int | Sequence[float] = 10,
    samples: int = 1,
    probes: int = 8,
    measure: int = 2,
    budget: float | None = None,
    resume: str | Path | None = None,
    progress: Progress | None = None,
    seed: int = 0,
) -> Sensitivities:
    """Measure the error of the model's output from each linear alone, in each candidate precision, at each timestep.

    The recipe balances the model once, with the middle candidate. All candidates are compared on that graph, so a
    model that is made of them needs no other factors. A layer's error is estimated from gradients of random products
    with the output, as :func:`fxquant.attribute` does it; the gradients are the same for all candidates, so a further
    candidate costs about two products per layer. For the largest estimates the rest of the model is run.

    Args:
        model: The float model, in evaluation mode.
        recipe: Name of a recipe without precision, or a recipe with the precision to begin from.
        candidates: Precisions, such as ``w4a8``, ``w4a16-g64`` or ``float``. With a recipe that has branches of low
            rank (``svdquant``), ``w4a4-r16`` gives a layer a branch of rank 16 and ``w4a4-r0`` none.
        calibrate: Runs the model as in :func:`fxquant.compile`; not needed with statistics that hold all that the
            recipe needs.
        statistics: Statistics of an earlier calibration that kept calls, or an object that receives them.
        layers: As in :func:`fxquant.compile`; only linears with the recipe's own precision are varied.
        timestep: Name of the ``forward`` argument that holds the timestep.
        timesteps: How many of the timesteps of kept calls to measure, spread evenly; or the timesteps themselves.
        samples: Samples per timestep.
        probes: Random gradients per timestep; the relative standard deviation of an estimate is at most
            ``sqrt(2 / (probes * samples))``.
        measure: Number of layers and precisions per timestep whose error is measured by running the rest of the model:
            those with the largest estimates.
        budget: Seconds for the timesteps, after calibration and rounding. What does not fit is listed in ``left_out``.
            At least one timestep is measured. None for no limit.
        resume: Folder that keeps what is finished: calls of the calibration, rounded layers, timesteps. The same call
            with the same folder continues from there; a call that measures something else is refused.
        progress: Called as ``progress(what, done, total)``.
        seed: Seed of the random vectors.

    Raises:
        ConfigurationError: If an option is out of range, a candidate is not a precision, or no calls were kept.
        CalibrationError: If calibration fails, or the statistics lack what the recipe needs.
        FolderInUseError: If another process works in the folder ``resume``.
    """
    check_options(timesteps, samples, probes, measure, budget, resume, seed)
    most = wanted_calls(timesteps)
    with sharing_traces(model), working_in(resume) as work:
        prepared = prepare(model, recipe, candidates, calibrate, statistics, layers, timestep, most, work)
        with without_autocast(device_of(model).type):
            job = Job(prepared, timesteps, samples, probes, measure, budget, seed)
            return job.run(None if work is None else work.folder, progress or (lambda what, done, total: None))


def check_options(timesteps: Any, samples: Any, probes: Any, measure: Any, budget: Any, resume: Any, seed: Any) -> None:
    """Refuse options that are out of range.

    Raises:
        ConfigurationError: Names the option.
    """
    check_type("samples", samples, int, "a whole number")
    check_type("probes", probes, int, "a whole number")
    check_type("measure", measure, int, "a number of layers and precisions")
    check_type("budget", budget, (Real, NoneType), "a number of seconds, or None for no limit")
    check_type("resume", resume, (str, Path, NoneType), "the path of a folder")
    check_type("seed", seed, int, "a whole number")
    if not isinstance(timesteps, int):
        check_type("timesteps", timesteps, Sequence, "a number of timesteps, or a list of timesteps")
        for step in timesteps:
            check_type("each of timesteps", step, Real, "a number")
    if (isinstance(timesteps, int) and timesteps < 1) or (not isinstance(timesteps, int) and not list(timesteps)):
        raise ConfigurationError(f"timesteps={timesteps!r} leaves nothing to measure; give 1 or more")
    for name, number in (("samples", samples), ("probes", probes)):
        if number < 1:
            raise ConfigurationError(f"{name}={number} leaves nothing to measure; give 1 or more")
    if measure < 0:
        raise ConfigurationError(f"measure={measure} should not be negative")
    if budget is not None and not budget > 0:
        raise ConfigurationError(f"budget={budget} is not a number of seconds; give a positive one, or None")
