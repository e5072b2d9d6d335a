"""Search for a speed: the best quality among choices whose call is some times faster than the float model's."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fxquant.allocation.job import Progress
from fxquant.allocation.prepared import Prepared
from fxquant.allocation.problem import Problem, problem_of
from fxquant.allocation.result import Point
from fxquant.allocation.timing import Timed, machine_text, time_calls, time_layers
from fxquant.calibration.recorded import arguments_of, inputs_on
from fxquant.capture.calls import BATCH, CallSpec
from fxquant.disk.finished_work import Part, check_numbers
from fxquant.errors import ConfigurationError, SpeedWarning, UnreachableTargetError
from fxquant.pipeline.backend import Backend
from fxquant.planning.layer_times import LayerTimes
from fxquant.planning.sensitivities import Sensitivities
from fxquant.runtime.float_model import device_of, dtype_of
from fxquant.runtime.model import GraphModel

_CLOSE = 0.01
"""The part of a speed by which a measurement may miss it: measurements differ by about as much."""
_FAR = 0.04
"""The part of a speed by which a model may be faster before a slower one with more quality is tried."""
_NANOSECONDS = 1e6
_SHORTEST = 1e-6
"""Milliseconds that a call takes at least; anything less is a damaged file."""

Made = tuple[dict[str, str], GraphModel, Point]


@dataclass(eq=False)
class SpeedSearch:
    """One search.

    Attributes:
        prepared: The model.
        found: The sensitivities, with the precisions that the backend runs.
        backend: The backend.
        text: Its name with its options.
        checks: The most models that are compiled and measured.
        progress: Called as ``progress(what, done, total)``.
        make: Compiles a choice, and measures its SQNR.
        points: What was compiled and measured so far.
    """

    prepared: Prepared
    found: Sensitivities
    backend: Backend
    text: str
    checks: int
    progress: Progress
    make: Callable[[dict[str, str]], tuple[GraphModel, Point]]
    points: list[Point] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.device = device_of(self.prepared.model)
        self.arguments, self.batch = _call(self.prepared)

    def run(self, speed: float, given: LayerTimes | str | Path | None) -> tuple[Made, LayerTimes, str]:
        """The choice, the times it was made from, and its speed in words.

        Args:
            speed: How many times faster than the float model's a call should be.
            given: Times of layers, or a file of them, which is written if it does not exist.
        """
        file = Path(given) if isinstance(given, (str, Path)) else None
        times = given if isinstance(given, LayerTimes) else LayerTimes.load(file) if file and file.exists() else None
        if times is not None:
            return self._by_table(speed, times)
        made, times, reached = self._measuring(speed)
        if file is not None:
            times.save(file)
        if not reached:
            best = made[2].speed or 0.0
            raise UnreachableTargetError(
                f"a call cannot be {speed:g} times faster than float with these candidates on backend {self.text!r} "
                f"({times.machine}): {best:.3g} times is the most, measured. Give speed="
                f"{max(math.floor(best * 100) / 100, 0.01):g}, candidates with fewer bits, or a faster backend",
                best,
            )
        return made, times, self._words(speed, made, times)

    def _by_table(self, speed: float, times: LayerTimes) -> tuple[Made, LayerTimes, str]:
        """The choice by times that are known. It does not depend on what is measured, so it is always the same."""
        if times.backend != self.text:
            raise ConfigurationError(
                f"the times of layers are of backend {times.backend!r}, and this search is for {self.text!r}; give the "
                "same backend, or another file"
            )
        problem = self._problem(times)
        chosen = problem.best(_NANOSECONDS * times.float_call / speed)
        if chosen is None:
            best = times.float_call / max(times.estimate(problem.cheapest()), 1e-9)
            raise UnreachableTargetError(
                f"a call cannot be {speed:g} times faster than float with these candidates, by the times that are "
                f"given: {best:.3g} times is the most. Give speed={math.floor(best * 100) / 100:g}, candidates with "
                "fewer bits, or another backend and its times",
                best,
            )
        made, _, _ = self._measured(chosen)
        if (made[2].speed or 0.0) < speed * (1 - _CLOSE):
            warnings.warn(
                f"a call is {made[2].speed:.3g} times faster than float, measured, and {speed:g} by the times of "
                f"layers that are given ({times.machine}); leave times out, or give another file, to measure them here",
                SpeedWarning,
                stacklevel=5,
            )
        return made, times, self._words(speed, made, times)

    def _measuring(self, speed: float) -> tuple[Made, LayerTimes, bool]:
        """Measure times of layers, and correct the rest of the call by what models measure that are made of them.

        Returns:
            The best model that reaches the speed, or else the fastest; the times by which it is chosen; and whether it
            reaches the speed.
        """
        times = self._times()
        fastest = self._problem(times).cheapest()
        made, floating, own = self._measured(fastest)
        least = sum(self._own(times, fastest))
        times = replace(times, float_call=floating, rest=own - least)
        if not _reaches(made, speed):
            return made, times, False
        # With this rest, no other choice is within the limit: the fastest, if no other reaches the speed.
        tried = [(made, replace(times, rest=floating / speed - least * (1 + 1e-6)))]
        for _ in range(self.checks - 1):
            chosen = self._problem(times).best(_NANOSECONDS * times.float_call / speed)
            if chosen == fastest:
                tried[0] = tried[0][0], times
            if chosen is None or any(chosen == other[0] for other, _ in tried):
                break
            made, floating, own = self._measured(chosen)
            tried.append((made, times))
            if _reaches(made, speed) and (made[2].speed or 0.0) < speed * (1 + _FAR):
                break
            call = own * times.float_call / floating  # The machine may be slower than before.
            times = replace(times, rest=call - sum(self._own(times, chosen)))
        reached = [one for one in tried if _reaches(one[0], speed)]
        made, times = max(reached, key=lambda one: one[0][2].estimated_db or -math.inf)
        return made, times, True

    def _measured(self, chosen: dict[str, str]) -> tuple[Made, float, float]:
        """Compile a choice; with the milliseconds of a call of the float model, and of its own."""
        quantized, point = self.make(chosen)
        name = f"call-times-{hashlib.sha256(repr(chosen).encode()).hexdigest()[:12]}"
        measure = partial(time_calls, self.prepared.model, quantized, self.arguments, self.device)
        floating, own = self._kept(name, repr(chosen), measure, partial(check_numbers, least=_SHORTEST), 2)
        self.points.append(replace(point, speed=floating / own))
        return (chosen, quantized, self.points[-1]), floating, own

    def _kept(self, name: str, of: str, measure: Callable[[], Any], check: Callable[..., None], *shape: int) -> Any:
        """Numbers that were measured; an interrupted search on this machine may have measured them."""
        if self.prepared.work is None:
            return measure()
        made_from = {"machine": machine_text(self.device), "backend": self.text, "layers or precisions": of}
        work = self.prepared.work
        return work.part(name, made_from, lambda: Part({}, measure()), lambda part: check(part, *shape)).data

    @staticmethod
    def _own(times: LayerTimes, chosen: dict[str, str]) -> list[float]:
        return [times.of(layer, precision) for layer, precision in chosen.items()]

    def _times(self) -> LayerTimes:
        """The layers, each in all its precisions; the call of the float model is not measured yet."""
        base = self.prepared.base.plan
        assert base is not None
        texts = dict.fromkeys(text for one in self.found.layers.values() for text in one.precisions)
        plans = {text: self.prepared.plan_of(text) for text in texts}
        cells = dict[tuple[str, str], Timed]()
        for name, one in self.found.layers.items():
            activation = base.layer(name).activation
            by_token = activation is not None and activation.method == "dynamic"
            for text in one.precisions:
                cells[name, text] = Timed.of(one, plans[text], by_token, self.batch)
        self.progress("times of layers", 0, 1)
        wanted = list(dict.fromkeys(cells.values()))

        def measured() -> list[tuple[float, float]]:
            found = time_layers(wanted, self.backend, dtype_of(self.prepared.model), self.device)
            return [found[one] for one in wanted]

        timed = dict(
            zip(wanted, self._kept("layer-times", repr(wanted), measured, check_numbers, len(wanted), 2), strict=True)
        )
        readers: dict[str, int] = {}
        for one in self.found.layers.values():
            readers[one.reads] = readers.get(one.reads, 0) + 1
        layers: dict[str, dict[str, float]] = {}
        for (name, text), cell in cells.items():
            shared, own = timed[cell]
            layers.setdefault(name, {})[text] = own + shared / readers[self.found.layers[name].reads]
        return LayerTimes(machine_text(self.device), self.text, max(self.batch, 1), 0.0, 0.0, layers)

    def _problem(self, times: LayerTimes) -> Problem:
        costs = {
            name: _NANOSECONDS * np.array([times.of(name, text) for text in one.precisions])
            for name, one in self.found.layers.items()
        }
        return problem_of(self.found, costs, fixed=_NANOSECONDS * times.rest)

    def _words(self, speed: float, made: Made, times: LayerTimes) -> str:
        estimated = times.float_call / max(times.estimate(made[0]), 1e-9)
        rest = f"a call takes {times.rest:.3g} ms beside these layers"
        if times.rest < 0:
            rest = f"the layers take {-times.rest:.3g} ms more by themselves than in a call"
        return (
            f"a call is {made[2].speed:.3g} times faster than float, measured, {estimated:.3g} by the times of its "
            f"layers, {speed:g} wanted; a float call of {times.batch} samples takes {times.float_call:.3g} ms, and "
            f"{rest}; times are of {times.machine}, backend {times.backend}"
        )


def _reaches(made: Made, speed: float) -> bool:
    return (made[2].speed or 0.0) >= speed * (1 - _CLOSE)


def _call(prepared: Prepared) -> tuple[dict[str, Any], int]:
    """The arguments of a kept call, and how many samples it has."""
    kept = prepared.statistics.calls
    call = next(iter(kept))
    spec = CallSpec.from_json(kept.kinds[call.kind])
    inputs = inputs_on(call, spec, device_of(prepared.model))
    arguments = arguments_of(spec, inputs)
    sizes = [
        tensor.shape[leaf.shape.index(BATCH)]
        for tensor, (_, leaf) in zip(inputs, spec.tensors, strict=True)
        if BATCH in leaf.shape
    ]
    return arguments, sizes[0] if sizes else 1
