"""Measures the rows of the demo's table: each model in a process of its own, because one core computes one model.

A small model does not keep two threads busy, but two models keep two cores busy.
"""

from __future__ import annotations

import json
import math
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path
from queue import Empty
from typing import Any

import torch
from diffusers import DiTPipeline
from torch import Tensor, nn

import fxquant
from fxquant.evaluation.features import Extractor
from fxquant.evaluation.reference import reference_of
from fxquant.evaluation.result import Evaluation
from fxquant.pipeline.recipes import Recipe, make_recipe

from .compare import (
    Calibrated,
    Result,
    checkpoint_megabytes,
    judge,
    noise_sqnr,
    predicted_noise,
    test_calls,
    transformer_of,
)
from .data import digits
from .generator import GUIDANCE, STEPS, build_pipeline, generate, load_pipeline
from .judge import DigitClassifier, JudgeFeatures, load_classifier
from .pictures import draw_salience
from .salience import plant_salience

MODELS = ("plain", "planted")

QUICK = {"iterations": 100, "rounding_rate": 0.05, "step_rate": 1e-3, "samples": 128}
"""Settings with which block reconstruction takes seconds; the papers use 20,000 iterations."""

SHOWN = 10
SEED = 0
BLOCK = 4
"""The block whose activations ``salience.png`` shows."""


@dataclass(frozen=True)
class Job:
    """One row of the table: a model, and the recipe and choice of layers with which it is quantized."""

    model: str
    recipe: str
    layers: str

    @property
    def title(self) -> str:
        """What pictures call the row."""
        return f"{self.recipe}, all layers" if self.layers == "all" else self.recipe


EVALUATED = Job("plain", "ptq4dit-gptq-w4a8", "default")
"""The row that ``fxquant.evaluate`` measures as well."""


@dataclass(frozen=True)
class Measured:
    """The figures of one row, and its first images, float32 ``[SHOWN, 3, 32, 32]``; of one row, more figures."""

    result: Result
    images: Tensor
    evaluation: Evaluation | None = None


def measure_all(jobs: Mapping[str, Sequence[Job]], count: int, out: Path) -> Iterator[tuple[Job, Measured]]:
    """Measure the jobs of all models; yields each as it is finished.

    Args:
        jobs: Jobs by model; the first is the float model.
        count: Digits to generate for each row.
        out: Folder for the picture of salient channels.
    """
    spawn = multiprocessing.get_context("spawn")  # A process that torch's threads run in cannot be forked.
    threads = max(1, torch.get_num_threads() // len(jobs))
    queue = spawn.Queue()
    with ProcessPoolExecutor(len(jobs), spawn, _begin, (queue, threads)) as pool:
        running = [pool.submit(_measure_model, model, each, count, out) for model, each in jobs.items()]
        left = len(running)
        while left:
            try:
                found = queue.get(timeout=1)
            except Empty:
                if all(task.done() for task in running):  # A process was killed, and could not say that it ended.
                    break
                continue
            if found is None:
                left -= 1
            else:
                yield found[0], Measured(found[1], torch.from_numpy(found[2]), found[3])
        for task in running:
            task.result()  # Raises what the process raised.


_OF_PROCESS: dict[str, Queue[tuple[Job, Result, Any, Evaluation | None] | None]] = {}
"""What a process was started with."""


def _begin(queue: Queue[tuple[Job, Result, Any, Evaluation | None] | None], threads: int) -> None:
    _OF_PROCESS["queue"] = queue
    torch.set_num_threads(threads)


def _measure_model(model: str, jobs: Sequence[Job], count: int, out: Path) -> None:
    queue = _OF_PROCESS["queue"]
    try:
        for job, found in rows(load_pipeline(), model, jobs, count, out):
            queue.put(
                (job, found.result, found.images.numpy(), found.evaluation)
            )  # A tensor in a queue needs its process alive.
    finally:
        queue.put(None)


def rows(pipe: DiTPipeline, name: str, jobs: Sequence[Job], count: int, out: Path) -> Iterator[tuple[Job, Measured]]:
    """Measure the jobs of one model in this process, one after the other; arguments as for :func:`measure_all`."""
    classifier = load_classifier()
    real = (digits("held_back")[0] + 1) / 2
    labels = torch.arange(count) % 10
    model: nn.Module = plant_salience(pipe.transformer) if name == "planted" else pipe.transformer
    with transformer_of(pipe, model):
        reference = generate(pipe, labels, seed=SEED)
    calls = test_calls(pipe, model)
    noise = predicted_noise(model, calls)
    calibrated: dict[str, Calibrated] = {}
    for job in jobs:
        if job.recipe == "float":
            figures = judge(reference, reference, labels, real, classifier)
            size = checkpoint_megabytes(model)
            yield (
                job,
                Measured(Result(name, "float", "", math.inf, math.inf, megabytes=size, **figures), reference[:SHOWN]),
            )
            continue
        if job.layers not in calibrated:
            calibrated[job.layers] = Calibrated(pipe, model, job.layers)
        quantized, seconds = calibrated[job.layers].quantize(quick(make_recipe(job.recipe, job.layers)))
        with transformer_of(pipe, quantized):
            images = generate(pipe, labels, seed=SEED)
        sqnr = noise_sqnr(quantized, noise, calls)
        result = Result(
            name,
            job.recipe,
            job.layers,
            sum(sqnr) / len(sqnr),
            min(sqnr),
            megabytes=checkpoint_megabytes(quantized),
            seconds=seconds,
            **judge(images, reference, labels, real, classifier),
        )
        if job == Job("planted", "ptq4dit-w8a8", "default"):
            draw_salience(calibrated[job.layers].statistics, quantized.plan, BLOCK, out / "salience.png")
        evaluation = evaluated(pipe, quantized, real, classifier, count, out) if job == EVALUATED else None
        yield job, Measured(result, images[:SHOWN], evaluation)


def evaluated(
    pipe: DiTPipeline, quantized: nn.Module, real: Tensor, classifier: DigitClassifier, count: int, out: Path
) -> Evaluation | None:
    """What ``fxquant eval`` says about a quantized transformer, with the classifier in place of Inception.

    Args:
        pipe: The pipeline, with the float transformer.
        quantized: The quantized transformer.
        real: Real images to compare with, ``[n, 3, 32, 32]`` in [0, 1].
        classifier: Finds features.
        count: Images to make with each transformer.
        out: Folder for ``evaluation.json`` and the picture ``evaluation.png``.
    """
    extractor = Extractor(JudgeFeatures(classifier), name="digit classifier")
    of_quantized = build_pipeline(quantized, pipe.vae)
    of_quantized.set_progress_bar_config(disable=True)
    found = fxquant.evaluate(
        of_quantized,
        pipe,
        images=count,
        batch=count,
        steps=STEPS,
        guidance=GUIDANCE,
        labels=range(10),
        features=extractor,
        against=reference_of((255 * real).round().byte().split(250), extractor),
        picture=out / "evaluation.png",
    )
    if found is not None:
        (out / "evaluation.json").write_text(json.dumps(found.to_json(), indent=1) + "\n")
    return found


def quick(recipe: Recipe) -> Recipe:
    """The recipe with a short block reconstruction if it has one; the full one takes hours."""
    learns = any(step.name == "reconstruct-blocks" for step in recipe.convert)
    return recipe.with_options("reconstruct-blocks", **QUICK) if learns else recipe
