"""What is measured: a model, one calibration of it for all recipes, and the error of each quantized model."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

import fxquant
from benchmarks.figures import finite, write
from benchmarks.low_bit import random_models
from examples.digits.compare import RecordMoments, calibration, predicted_noise, test_calls
from examples.digits.generator import load_pipeline
from examples.digits.salience import plant_salience
from fxquant.calibration.kept_calls import calls_wanted
from fxquant.numerics.sqnr import sqnr_db
from fxquant.pipeline.recipes import Recipe, make_recipe

CALIBRATED, TESTED = 25, 20
"""Numbers of timesteps, as for the digits model."""

_CALIBRATION_SEED, _TEST_SEED = 0, 10_000


@dataclass(frozen=True)
class Measured:
    """One quantized model compared with the float model.

    Attributes:
        steps: SQNR of the output in dB at each test timestep, in the order of sampling: from noise to image.
        megabytes: Size of the tensors, in units of 10**6 bytes.
        seconds: Seconds of the conversion, without the shared calibration.
        error: Why there is no such model; empty if there is one.
    """

    steps: list[float]
    megabytes: float
    seconds: float
    error: str = ""

    @property
    def mean(self) -> float:
        """Mean SQNR over the timesteps, in dB."""
        return sum(self.steps) / len(self.steps)

    @property
    def worst(self) -> float:
        """SQNR of the worst timestep, in dB."""
        return min(self.steps)

    @property
    def thirds(self) -> tuple[float, float, float]:
        """Mean SQNR over the first, the middle and the last third of the timesteps, in dB."""
        count = len(self.steps)
        ends = [0, round(count / 3), round(2 * count / 3), count]
        parts = [self.steps[start:stop] for start, stop in pairwise(ends)]
        first, middle, last = (sum(part) / len(part) for part in parts)
        return first, middle, last


class Subject:
    """A float model with the calls on which quantized models are compared, calibrated at first use.

    Args:
        name: Name in the tables.
        model: The float model.
        calibrate: Runs the model as calibration does.
        calls: Arguments of the compared calls.
    """

    def __init__(
        self, name: str, model: nn.Module, calibrate: Callable[[], None], calls: list[tuple[tuple[Any, ...], Any]]
    ) -> None:
        self.name, self.model, self.calls = name, model, calls
        self._calibrate = calibrate

    @cached_property
    def reference(self) -> list[Tensor]:
        """Outputs of the float model."""
        return _outputs(self.model, self.calls)

    @cached_property
    def statistics(self) -> fxquant.Statistics:
        """What one calibration recorded: all that any recipe of the tables needs."""
        choosing = [make_recipe(f"auto-{precision}").convert for precision in ("w8a8", "w4a8", "w4a4")]
        # As many calls to run again as these recipes would keep themselves.
        found = fxquant.Statistics(keep_calls=max(map(calls_wanted, choosing)))
        recipe = Recipe(make_recipe("rtn-gptq-w8a8").prepare, (RecordMoments(),))
        fxquant.compile(self.model, recipe=recipe, calibrate=self._calibrate, statistics=found, measure=0)
        return found

    def measure(self, recipe: Recipe) -> Measured:
        """Quantize the model and compare it."""
        statistics, began = self.statistics, time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", fxquant.errors.QualityWarning)
                quantized = fxquant.compile(self.model, recipe=recipe, statistics=statistics, measure=0)
        except fxquant.errors.ConfigurationError as refusal:
            return Measured([], 0.0, 0.0, str(refusal))
        seconds = time.perf_counter() - began
        pairs = zip(self.reference, _outputs(quantized, self.calls), strict=True)
        tensors = quantized.tensors().values()
        size = sum(tensor.nbytes for tensor in tensors) / 1e6
        return Measured([sqnr_db(*pair) for pair in pairs], size, seconds)


@torch.no_grad()
def _outputs(model: nn.Module, calls: Iterable[tuple[tuple[Any, ...], Any]]) -> list[Tensor]:
    return predicted_noise(model, list(calls))


def _digits(name: str) -> Subject:
    pipe = load_pipeline()
    model = pipe.transformer if name == "plain" else plant_salience(pipe.transformer)
    return Subject(name, model, calibration(pipe, model), test_calls(pipe, model))


def _random(name: str) -> Subject:
    model = random_models.flux_like() if name == "flux-like" else random_models.pixart_like()

    def schedule(count: int) -> list[float]:
        return torch.linspace(999, 0, count).round().tolist()

    calibrating = random_models.calls(model, schedule(CALIBRATED), _CALIBRATION_SEED)

    @torch.no_grad()
    def calibrate() -> None:
        for call in calibrating:
            model(**call)

    tests = random_models.calls(model, schedule(TESTED), _TEST_SEED)
    return Subject(name, model, calibrate, [((), call) for call in tests])


SUBJECTS: dict[str, Callable[[str], Subject]] = {
    "plain": _digits, "planted": _digits, "flux-like": _random, "pixart-like": _random,
}  # fmt: skip
"""The models by name: digits, digits with planted salience, and random weights with planted salience."""


class Results:
    """Measurements in a JSON file, from which an interrupted run continues.

    A measurement belongs to a model and the text of a recipe. If passes change what they do, remove the file.

    Args:
        path: The file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self._held = {key: _from_json(value) for key, value in held.items()}

    def of(self, subject: str, recipe: Recipe) -> Measured | None:
        """A measurement, or None if there is none yet."""
        return self._held.get(_key(subject, recipe))

    def fill(self, jobs: Iterable[tuple[str, Recipe]], title: str) -> None:
        """Measure what is missing, model by model, and write the file after each measurement."""
        missing = [(name, recipe) for name, recipe in jobs if self.of(name, recipe) is None]
        missing = list({_key(*job): job for job in missing}.values())
        missing.sort(key=lambda job: list(SUBJECTS).index(job[0]))
        subject = None
        for name, recipe in track(missing, title):
            if subject is None or subject.name != name:
                subject = SUBJECTS[name](name)
            self._held[_key(name, recipe)] = subject.measure(recipe)
            self._write()

    def _write(self) -> None:
        rows = {key: asdict(value) for key, value in self._held.items()}
        for row in rows.values():
            row["steps"] = [finite(step) for step in row["steps"]]
        write(self.path, json.dumps(rows, indent=1) + "\n")


def _key(subject: str, recipe: Recipe) -> str:
    return f"{subject} {hashlib.sha256(str(recipe).encode()).hexdigest()[:16]}"


def _from_json(row: dict[str, Any]) -> Measured:
    return Measured(**{**row, "steps": [float(step) for step in row["steps"]]})
