"""Search the precision of each layer for a size, a quality or a speed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
from torch import nn

from fxquant.allocation.candidates import Candidate, with_candidates
from fxquant.allocation.job import Job, Progress
from fxquant.allocation.measure import CANDIDATES, RECIPE, check_options
from fxquant.allocation.prepared import Prepared, begun_from, prepare, samples_of
from fxquant.allocation.problem import problem_of
from fxquant.allocation.result import Choice, Point, SearchResult
from fxquant.allocation.speed import SpeedSearch
from fxquant.allocation.targets import check_target
from fxquant.calibration.samples import output_sqnr
from fxquant.capture.sharing import sharing_traces
from fxquant.capture.threads import without_autocast
from fxquant.disk.finished_work import Part, check_numbers, working_in
from fxquant.errors import BackendError, ConfigurationError, UnreachableTargetError, check_type
from fxquant.inspect.errors.schedule import wanted_calls
from fxquant.ir.digest import digest_of_code
from fxquant.pipeline.backend import Backend, resolve_backend
from fxquant.pipeline.recipes import Recipe
from fxquant.planning.attribution import to_db
from fxquant.planning.layer_times import LayerTimes
from fxquant.planning.plan import Plan
from fxquant.planning.sensitivities import Sensitivities
from fxquant.runtime.float_model import device_of, weights_digest, whole_digest
from fxquant.runtime.model import GraphModel
from fxquant.statistics.collection import Statistics

_CLOSE = 0.1
"""dB above the target at which a search for the smallest size stops."""
_HALVINGS = 12
_CURVE = 9


def search(
    model: nn.Module,
    *,
    size: float | None = None,
    sqnr: float | None = None,
    speed: float | None = None,
    sensitivities: Sensitivities | None = None,
    recipe: str | Recipe = RECIPE,
    candidates: Sequence[str] = CANDIDATES,
    calibrate: Callable[[], Any] | None = None,
    statistics: Statistics | None = None,
    layers: str = "default",
    timestep: str | None = "timestep",
    backend: str | Backend = "fake-quant",
    timesteps: int | Sequence[float] = 10,
    samples: int = 1,
    probes: int = 8,
    measure: int = 2,
    budget: float | None = None,
    resume: str | Path | None = None,
    checks: int = 4,
    times: LayerTimes | str | Path | None = None,
    progress: Progress | None = None,
    seed: int = 0,
) -> SearchResult:
    """Choose the precision of each layer, and quantize the model with it.

    Sensitivities are measured unless they are given (:func:`fxquant.sensitivity`). An integer program then chooses one
    precision per layer, of those that the backend runs: for ``size`` and ``speed`` those with the highest mean SQNR of
    the output within the limit, for ``sqnr`` those with the smallest size that reach it. The result is measured. If it
    misses the SQNR or the speed that was asked for, or passes it by far, the search is repeated with a corrected
    target. If one precision for all layers fits a ``size`` and measures better, it is taken. Layers that read the same
    value get the same activation precision, so that kernels share its codes; layers with tied weights get the same
    precision. The same call makes the same plan; for a ``speed`` with the same ``times``.

    Args:
        model: The float model, in evaluation mode.
        size: Share of the float model's bytes, up to 1; or a number of bytes.
        sqnr: Mean SQNR of the output over the kept calls' timesteps, in dB.
        speed: How many times faster than the float model's a call should be, on this device and ``backend``, both
            uncompiled. Calls are the kept ones, with up to 16 samples. The layers are timed in each precision, and what
            is made of them is timed beside the float model. A speed counts as reached from 99% of it.
        sensitivities: Those of an earlier measurement of the same model with the same recipe.
        recipe: As in :func:`fxquant.sensitivity`.
        candidates: As in :func:`fxquant.sensitivity`; those of the sensitivities, if they are given.
        calibrate: As in :func:`fxquant.sensitivity`.
        statistics: As in :func:`fxquant.sensitivity`.
        layers: As in :func:`fxquant.compile`.
        timestep: As in :func:`fxquant.compile`.
        backend: What the result is lowered to.
        timesteps: As in :func:`fxquant.sensitivity`, as the following four.
        samples: Samples per timestep.
        probes: Random gradients per timestep.
        measure: Errors per timestep that are measured, not estimated.
        budget: Seconds for the sensitivities.
        resume: Folder that keeps what is finished: calls of the calibration, rounded layers, timesteps of the
            sensitivities, times of layers, and what was measured of each model. The same call with the same folder
            continues from there.
        checks: The most models that are compiled and measured for an ``sqnr`` or a ``speed``.
        times: For a ``speed``: times of layers that were measured earlier, or a file of them
            (:meth:`LayerTimes.save`). A file that does not exist is written. With given times the choice does not
            depend on what is measured now, so the same call makes the same plan.
        progress: Called as ``progress(what, done, total)``.
        seed: Seed of the random vectors.

    Raises:
        ConfigurationError: If not exactly one target is given, an option is out of range, or the sensitivities are of
            another model or recipe.
        UnreachableTargetError: If no choice of the candidates reaches the target; says the best that does.
        BackendError: If the backend runs a layer in none of the candidates.
        CalibrationError: If calibration fails, or the statistics lack what the recipe needs.
        FolderInUseError: If another process works in the folder ``resume``.
    """
    target = check_target(size, sqnr, speed)
    check_options(timesteps, samples, probes, measure, budget, resume, seed)
    check_type("checks", checks, int, "a number of models")
    check_type("sensitivities", sensitivities, (Sensitivities, NoneType), "what fxquant.sensitivity returned")
    check_type("times", times, (LayerTimes, str, Path, NoneType), "times of layers, or the path of a file of them")
    if times is not None and speed is None:
        raise ConfigurationError("times of layers are read for a speed only; give speed=, or leave times out")
    if checks < 1:
        raise ConfigurationError(f"checks={checks} leaves nothing to measure; give 1 or more")
    if sensitivities is not None:
        _refuse_other(sensitivities, recipe, candidates, layers)
        candidates = sensitivities.precisions
        if sensitivities.weights != weights_digest(model):
            raise ConfigurationError("the sensitivities are of other weights than this model's; measure them again")
        recipe = Recipe.parse(sensitivities.recipe)
    most = wanted_calls(timesteps)
    show = progress or (lambda what, done, total: None)
    with sharing_traces(model), working_in(resume) as work:
        prepared = prepare(model, recipe, candidates, calibrate, statistics, layers, timestep, most, work)
        with without_autocast(device_of(model).type):
            if sensitivities is None:
                folder = None if work is None else work.folder
                sensitivities = Job(prepared, timesteps, samples, probes, measure, budget, seed).run(folder, show)
            return _Search(prepared, sensitivities, backend, checks, show).run(target, size, sqnr, speed, times)


def _refuse_other(found: Sensitivities, recipe: str | Recipe, candidates: Sequence[str], layers: str) -> None:
    """Refuse candidates and a recipe that are given beside sensitivities of others; the defaults stand for theirs.

    Raises:
        ConfigurationError: Names what differs.
    """
    check_type("candidates", candidates, Sequence, "a list of precisions, such as ['w4a8', 'w8a8']")
    measured = [Candidate.parse(text) for text in found.precisions]
    if tuple(candidates) != CANDIDATES and {*map(Candidate.parse, candidates)} != {*measured}:
        raise ConfigurationError(
            f"the candidates are {', '.join(candidates)}, and the sensitivities are those of "
            f"{', '.join(found.precisions)}; leave the candidates out, or measure them"
        )
    begun = recipe if recipe == RECIPE else begun_from(recipe, [one.precision for one in measured], layers)
    if begun != RECIPE and str(begun) != found.recipe:
        raise ConfigurationError(
            f"the recipe is {recipe}, and the sensitivities are those of the recipe {found.recipe}; leave the recipe "
            "out, or measure again"
        )


class _Search:
    """One search."""

    def __init__(
        self, prepared: Prepared, found: Sensitivities, backend: str | Backend, checks: int, progress: Progress
    ) -> None:
        self.prepared, self.measured, self.limit_of_checks, self.progress = prepared, found, checks, progress
        self.text = backend if isinstance(backend, str) else backend.name
        self.backend = resolve_backend(backend).on(device_of(prepared.model))
        missing = [name for name in found.layers if name not in prepared.layers]
        if missing:
            raise ConfigurationError(f"the sensitivities are of other layers, such as {missing[0]}; measure them again")
        self.found, self.refused = _that_run(prepared, found, self.backend)
        self.sizes = problem_of(self.found, {n: np.array(one.bytes, float) for n, one in self.found.layers.items()})
        self.samples = samples_of(prepared)
        self.checked: list[Point] = []

    def run(
        self, target: str, size: float | None, sqnr: float | None, speed: float | None,
        times: LayerTimes | str | Path | None,
    ) -> SearchResult:  # fmt: skip
        """Choose, compile, measure."""
        if size is not None:
            limit = size * self.found.bytes_before if size <= 1 else size
            return self._result(target, *self._best_of(self._within(limit, size), limit))
        if sqnr is not None:
            return self._result(target, *self._reaching(sqnr))
        assert speed is not None
        searching = SpeedSearch(
            self.prepared, self.found, self.backend, self.text, self.limit_of_checks, self.progress, self._made
        )
        found, used, words = searching.run(speed, times)
        self.checked = searching.points
        return replace(self._result(target, *found), cost_model=words, times=used)

    def _best_of(self, chosen: dict[str, str], limit: float) -> tuple[dict[str, str], GraphModel, Point]:
        """A choice, or one precision for all layers that fits and measures better: estimates of few probes may err."""
        found = chosen, *self._made(chosen)
        fitting = {
            text: self.found.uniform_db(text) or -math.inf
            for text in self.found.output
            if (one := self.found.uniform(text)) is not None and one != chosen and self.sizes.cost(one) <= limit
        }
        best = max(fitting, key=lambda text: fitting[text], default=None)
        if best is not None and fitting[best] > (found[2].measured_db or math.inf):
            other = dict.fromkeys(chosen, best)
            found = max(found, (other, *self._made(other)), key=lambda one: one[2].measured_db or -math.inf)
        return found

    def _within(self, limit: float, size: float) -> dict[str, str]:
        problem = self.sizes
        chosen = problem.best(limit)
        if chosen is None:
            least = problem.cheapest()
            smallest, share = problem.cost(least), problem.cost(least) / max(self.found.bytes_before, 1)
            wanted = (
                f"{limit / 1e6:.3g} MB" if size <= 1 else f"{size:g} bytes (a size above 1 counts bytes, not shares)"
            )
            raise UnreachableTargetError(
                f"a model of {wanted} cannot be made of these candidates: the smallest has "
                f"{smallest / 1e6:.3g} MB, {share:.1%} of float, with an estimated SQNR of "
                f"{problem.mean_db(least):.1f} dB. Give size={math.ceil(share * 1000) / 1000}, or candidates with "
                "fewer bits",
                share,
            )
        return chosen

    def _reaching(self, sqnr: float) -> tuple[dict[str, str], GraphModel, Point]:
        """The smallest model that measures an SQNR: the estimate's target is corrected by what was measured."""
        wanted, good = sqnr, None
        for _ in range(self.limit_of_checks):
            chosen = self._smallest(wanted)
            if good is not None and chosen == good[0]:
                break
            made, point = self._made(chosen)
            assert point.measured_db is not None and point.estimated_db is not None
            if point.measured_db >= sqnr and (good is None or point.size < good[2].size):
                good = chosen, made, point
            if sqnr <= point.measured_db < sqnr + _CLOSE or chosen == self.sizes.best():
                break
            wanted = point.estimated_db + (sqnr - point.measured_db) + _CLOSE / 4
        if good is None:
            chosen = self.sizes.best() or self.sizes.cheapest()
            made, point = self._made(chosen)
            assert point.measured_db is not None
            if point.measured_db < sqnr:
                raise UnreachableTargetError(
                    f"an SQNR of {sqnr:g} dB cannot be reached with these candidates: the best has "
                    f"{point.measured_db:.1f} dB at {point.size / 1e6:.3g} MB. Add candidates with more bits, or float",
                    point.measured_db,
                )
            good = chosen, made, point
        return good

    def _smallest(self, sqnr: float) -> dict[str, str]:
        """The smallest choice whose estimate reaches an SQNR, by bisection on the size; the best if none does."""
        best, least = self.sizes.best(), self.sizes.cheapest()
        assert best is not None
        if self.sizes.mean_db(least) >= sqnr:
            return least
        low, high, found = self.sizes.cost(least), self.sizes.cost(best), best
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            tried = self.sizes.best(middle)
            if tried is not None and self.sizes.mean_db(tried) >= sqnr:
                high, found = min(middle, self.sizes.cost(tried)), tried
            else:
                low = middle
        return found

    def _made(self, chosen: dict[str, str]) -> tuple[GraphModel, Point]:
        """Quantize the model with a choice, and measure it."""
        self.progress("check", len(self.checked), self.limit_of_checks)
        base = self.prepared.base.plan
        assert base is not None
        plan = with_candidates(base, {name: Candidate.parse(text) for name, text in chosen.items()})
        plan.decisions_of(Choice).update(self.choices(chosen))
        made = self.prepared.compile(plan, self.backend)
        assert made.plan is not None
        made.plan.output_sqnr_db = self._sqnr(made, made.plan)
        measured = mean_sqnr(made.plan.output_sqnr_db.values())
        point = Point("searched", made.plan.bytes_after, self.sizes.mean_db(chosen), measured)
        self.checked.append(point)
        return made, point

    @cached_property
    def _weights(self) -> str:
        return whole_digest(self.prepared.model)

    def _sqnr(self, made: GraphModel, plan: Plan) -> dict[float, float]:
        """The SQNR by timestep; an interrupted search may have measured it."""
        work, text = self.prepared.work, plan.fingerprint()
        if work is None:
            return output_sqnr(made, self.samples)
        made_from = {
            "weights": self._weights,
            "operations": " ".join(map(digest_of_code, made.graphs)),
            "sensitivities": self.measured.made_for,
            "plan": text,
            "backend": self.text,
        }
        found = work.part(
            f"sqnr-{text[:12]}",
            made_from,
            lambda: Part({}, list(output_sqnr(made, self.samples).items())),
            lambda part: check_numbers(part, len(part.data), 2),
        )
        return dict(found.data)

    def choices(self, chosen: dict[str, str]) -> dict[str, Choice]:
        """Each layer's choice with its reason."""
        whole, found = self.sizes.error(chosen), dict[str, Choice]()
        for name, text in chosen.items():
            layer = self.found.layers[name]
            errors = dict(zip(layer.precisions, self.sizes.errors[name], strict=True))
            share = float((errors[text] / np.maximum(whole, 1e-30)).mean())
            cheaper = [p for p in layer.precisions if layer.size(p) < layer.size(text)]
            if layer.shares:
                why = f"shares the weight of {layer.shares}"
            elif cheaper and not whole.any():
                other = max(cheaper, key=layer.size)
                why = f"{other} would save {layer.size(text) - layer.size(other):,} bytes; no layer is rounded now"
            elif not cheaper:
                why = "the smallest of its candidates"
            else:
                other = max(cheaper, key=layer.size)
                more = float(((errors[other] - errors[text]) / np.maximum(whole, 1e-30)).mean())
                saved = layer.size(text) - layer.size(other)
                why = f"{other} would save {saved:,} bytes and change the model's error by {more:+.1%}"
            alone = to_db(float(errors[text].mean()))
            finite = alone if alone is not None and math.isfinite(alone) else None
            found[name] = Choice(text, layer.size(text), finite, share, why)
        return found

    def _result(self, target: str, chosen: dict[str, str], made: GraphModel, point: Point) -> SearchResult:
        least, most = self.sizes.cost(self.sizes.cheapest()), self.sizes.cost(self.sizes.best() or chosen)
        curve = []
        for limit in np.linspace(least, most, _CURVE):
            tried = self.sizes.best(float(limit) + 1)
            if tried is not None:
                curve.append(Point("searched", int(self.sizes.cost(tried)), self.sizes.mean_db(tried)))
        uniform = [
            Point(name, self.found.uniform_bytes(name), None, self.found.uniform_db(name)) for name in self.found.output
        ]
        self.progress("done", len(self.checked), len(self.checked))
        return SearchResult(
            made, target, chosen, point, tuple(curve), tuple(uniform), tuple(self.checked), self.measured,
            choices=self.choices(chosen), refused=self.refused,
        )  # fmt: skip


def _that_run(prepared: Prepared, found: Sensitivities, backend: Backend) -> tuple[Sensitivities, dict[str, str]]:
    """The sensitivities without the precisions that the backend does not run, and which these are.

    Raises:
        BackendError: If it runs a layer in none of its precisions.
    """
    refuse, reasons = backend.limits().refuse, dict[str, dict[str, str]]()
    for text in dict.fromkeys(text for one in found.layers.values() for text in one.precisions):
        plan = prepared.plan_of(text)
        for name, one in found.layers.items():
            if text in one.precisions and (reason := refuse(plan.layer(name))) is not None:
                reasons.setdefault(text, {})[name] = reason
    layers = {
        name: one.only([text for text in one.precisions if name not in reasons.get(text, ())])
        for name, one in found.layers.items()
    }
    none = next((name for name, one in layers.items() if not one.precisions), None)
    if none is not None:
        tried = found.layers[none].precisions
        raise BackendError(
            f"backend {backend.name!r} runs layer {none!r} in none of the candidates {', '.join(tried)}: "
            f"{reasons[tried[-1]][none]}"
        )
    refused = {
        f"{text} in {len(own)} layers, such as {next(iter(own))}": next(iter(own.values()))
        for text, own in reasons.items()
    }
    return replace(found, layers=layers), refused


def mean_sqnr(values: Iterable[float]) -> float | None:
    """The mean of SQNRs in dB; None of none.

    Outputs without any error are left out, unless all are such: infinite. One that is not finite makes the mean
    ``-inf``, so that no target is reached with it.
    """
    found = list(values)
    if any(math.isnan(db) or db == -math.inf for db in found):
        return -math.inf
    known = [db for db in found if math.isfinite(db)]
    return sum(known) / len(known) if known else max(found, default=None)
