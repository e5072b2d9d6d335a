"""Attribute the error of a quantized model to its layers and timesteps, within a budget of time."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxquant.calibration.kept_calls import some_inputs
from fxquant.calibration.recorded import arguments_of, inputs_on, record_calls
from fxquant.capture.calls import CallSpec
from fxquant.capture.threads import without_autocast
from fxquant.capture.trace import Architecture
from fxquant.disk.finished_work import working_in
from fxquant.errors import ConfigurationError, check_type
from fxquant.inspect.errors.graphs import make_pairs
from fxquant.inspect.errors.schedule import calls_at, chosen_timesteps, spread_order, wanted_calls
from fxquant.inspect.errors.sweep import Energies, Sweep
from fxquant.ir.digest import digest_of_code
from fxquant.planning.attribution import Attribution, LayerErrors
from fxquant.planning.plan import Plan
from fxquant.runtime.float_model import check_model, check_weights, class_path, device_of, weights_digest, whole_digest
from fxquant.runtime.given import quantized_model
from fxquant.runtime.model import GraphModel
from fxquant.statistics.collection import Statistics
from fxquant.statistics.kept_calls import KeptCall, KeptCalls, Run

TIMESTEPS = 10
"""Timesteps that are measured unless the caller says otherwise."""

_APART = 0.1  # Part of the error that may belong to no layer before the result says so.
_TINY = 1e-30
_SHORT, _APART_FROM_LAYERS = "some contributions", "what belongs to no layer"  # Keys of ``left_out``.
_ONLY_ESTIMATES = "the budget allowed estimates only at timesteps "

Progress = Callable[[str, int, int], object]


def attribute(
    quantized: nn.Module,
    model: nn.Module,
    inputs: Statistics | Callable[[], Any],
    *,
    timesteps: int | Sequence[float] = TIMESTEPS,
    samples: int = 1,
    probes: int = 8,
    measure: int | None = 3,
    budget: float | None = None,
    resume: str | Path | None = None,
    progress: Progress | None = None,
    seed: int = 0,
) -> Attribution:
    """Find out which layers, at which timesteps, cause the error of a quantized model's output.

    For each layer there are two errors. The local error is that of the layer's own output if this layer alone is
    quantized and gets the inputs of the float model. The contribution is the error of the model's output if this layer
    alone is quantized. Contributions are estimated from gradients for all layers (:mod:`fxquant.inspect.errors.sweep`),
    and then measured for the layers with the largest estimates by running the rest of the model. All errors are of
    layers as passes left them, with balance factors folded in, in the arithmetic of the ``fake-quant`` backend.

    One timestep costs about ``4 + probes`` calls of the float model with ``samples`` samples, and half a call for each
    measured layer. Memory: the float weights twice, and the values within one block.

    Args:
        quantized: What :func:`fxquant.compile` or :func:`fxquant.load` returned. Its plan receives the result, which
            :func:`fxquant.save` and :func:`fxquant.report` then include.
        model: The float model that it was made from.
        inputs: Statistics that kept calls (``keep_calls=``), or a function that runs ``model`` as in calibration.
        timesteps: How many of the timesteps of these calls to measure, spread evenly; or the timesteps themselves.
        samples: Samples per timestep.
        probes: Random vectors per timestep for the estimates; 0 for no estimates.
        measure: Number of layers per timestep whose contribution is measured; None for all.
        budget: Seconds. Timesteps are measured in an order that covers the schedule evenly at any time. What does not
            fit is listed in ``left_out``. At least one timestep is measured. None for no limit.
        resume: Folder in which finished timesteps are kept. The same call with the same folder continues from them.
        progress: Called as ``progress(what, done, total)``.
        seed: Seed of the random vectors.

    Raises:
        ConfigurationError: If ``quantized`` is not quantized, ``model`` is not the float model that it was made from,
            an option is out of range, or the statistics kept no calls.
        CalibrationError: If the statistics are of another model, or the function fails or never calls the model.
        NonFiniteError: If the float model's output holds NaN or infinity.
    """
    quantized, plan = quantized_model(quantized, "attribute")
    check_model(model)
    check_weights(model)
    if not callable(inputs):
        check_type("inputs", inputs, Statistics, "statistics that kept calls, or a function that runs the model")
    check_type("resume", resume, (str, Path, NoneType), "the path of a folder")
    check_type("seed", seed, int, "a whole number")
    _check_options(timesteps, samples, probes, measure, budget)
    began = time.monotonic()
    with without_autocast(device_of(model).type), working_in(resume):
        kept = _calls(plan, model, inputs, wanted_calls(timesteps))
        job = _Job(plan, kept, chosen_timesteps(kept, timesteps), samples, probes, measure, seed, began, budget)
        key = _fingerprint(job, model, quantized) if resume is not None else ""
        if resume is not None:
            job.adopt(Attribution.load(resume, key))
        if job.left():
            specs = [CallSpec.from_json(kind) for kind in kept.kinds]
            used = sorted({call.kind for step in job.left() for call in job.calls_at(step)})
            pairs = make_pairs(quantized, model, [specs[number] for number in used])
            sweeps = {number: Sweep(pair) for number, pair in zip(used, pairs, strict=True)}
            for name in (name for sweep in sweeps.values() for name in sweep.names):
                job.names.setdefault(name)
            job.model = model
            job.run(sweeps, quantized.device, resume, key, progress or (lambda what, done, total: None))
    plan.attribution = job.result()
    return plan.attribution


@dataclass(eq=False)
class _Job:
    """What is measured, and what was found so far: energies by timestep and name, ``""`` for the whole model."""

    plan: Plan
    kept: KeptCalls
    timesteps: list[float]
    samples: int
    probes: int
    measure: int | None
    seed: int
    began: float
    budget: float | None
    found: dict[float, dict[str, Energies]] = field(default_factory=dict)
    names: dict[str, None] = field(default_factory=dict)
    earlier: float = 0.0
    short: list[str] = field(default_factory=list)
    model: nn.Module | None = None
    apart: float = 0.0
    apart_before: str = ""

    def left(self) -> list[float]:
        """The timesteps to measure, in an order whose beginning covers the schedule evenly, whatever its length."""
        return [step for step in spread_order(self.timesteps) if step not in self.found]

    def calls_at(self, step: float) -> list[KeptCall]:
        """For each kind of call, the first one that was kept of a timestep."""
        return calls_at(self.kept, step)

    def run(
        self, sweeps: dict[int, Sweep], device: torch.device, folder: str | Path | None, key: str, progress: Progress
    ) -> None:
        """Measure timestep by timestep, as long as the budget lasts."""
        durations: list[float] = []
        steps, total = self.left(), len(self.timesteps)
        for number, step in enumerate(steps):
            progress(f"timestep {step:g}", len(self.found), total)
            start = time.monotonic()
            if self.budget is not None and durations and self._spent() + max(durations) > self.budget:
                break
            until = math.inf
            if self.budget is not None:  # An equal part of the rest for each timestep.
                until = start + (self.budget - self._spent()) / (len(steps) - number)
            found: dict[str, Energies] = {}
            estimating = 0.0
            for call in self.calls_at(step):
                estimating += self._one(sweeps[call.kind], call, device, step, found, until)
            durations.append(estimating)
            self.found[step] = found
            if folder is not None:
                self.result().save(folder, key)
        progress("done", len(self.found), total)

    def _one(
        self, sweep: Sweep, call: KeptCall, device: torch.device, step: float, found: dict[str, Energies], until: float
    ) -> float:
        """Measure one call; returns the seconds without the measured contributions."""
        start, spec = time.monotonic(), sweep.pair.call
        assert spec is not None
        inputs = some_inputs(spec, inputs_on(call, spec, device), self.samples)
        sweep.forward(inputs)
        output = Energies(sweep.signal, sweep.whole_error(inputs))
        if self.model is not None:  # Once: this costs a call of the float model.
            self.apart = _distance(self.model, spec, inputs, sweep.exact) / max(output.both, _TINY)
            self.model = None
        errors = sweep.backward(self.probes, self.seed + self.timesteps.index(step))
        took = time.monotonic() - start
        _add(found, "", output)
        wanted = sorted(errors, key=lambda name: -self._estimate(name, errors[name]))
        for name in wanted[: self.measure]:
            before = time.monotonic()
            errors[name].measured = sweep.measure(name)
            if 2 * time.monotonic() - before > until:
                if name != wanted[: self.measure][-1] and f"{step:g}" not in self.short:
                    self.short.append(f"{step:g}")
                break
        for name, energies in errors.items():
            _add(found, name, energies)
        return took

    def _estimate(self, name: str, now: Energies) -> float:
        """The estimate over all timesteps so far; without estimates, the local error."""
        all_ = [now, *(found[name] for found in self.found.values() if name in found)]
        if not self.probes:
            return sum(one.both / one.signal for one in all_ if one.signal)
        return sum(one.estimated or 0.0 for one in all_)

    def adopt(self, earlier: Attribution | None) -> None:
        """Continue from what an interrupted run found."""
        if earlier is None:
            return
        self.names |= dict.fromkeys(earlier.layers)
        self.earlier = earlier.seconds
        if note := earlier.left_out.get(_SHORT):
            self.short = note.removeprefix(_ONLY_ESTIMATES).split(", ")
        self.apart_before = earlier.left_out.get(_APART_FROM_LAYERS, "")
        for number, step in enumerate(earlier.timesteps):
            self.found[step] = {"": Energies(1.0, earlier.output[number] or 0.0)}
            for name, layer in earlier.layers.items():
                cells = (layer.local, layer.weights, layer.inputs, layer.estimated, layer.measured)
                both, *others = (cell[number] for cell in cells)
                if both is not None:
                    self.found[step][name] = Energies(1.0, both, *others)

    def result(self) -> Attribution:
        """What was found so far."""
        steps = tuple(step for step in self.timesteps if step in self.found)
        whole = [self.found[step][""] for step in steps]
        layers = {}
        for name in self.names:
            cells = [self.found[step].get(name) or Energies() for step in steps]
            own, outputs = [cell.signal for cell in cells], [one.signal for one in whole]
            layers[name] = LayerErrors(
                name,
                steps,
                local=_ratios([cell.both for cell in cells], own),
                weights=_ratios([cell.weights for cell in cells], own),
                inputs=_ratios([cell.inputs for cell in cells], own),
                estimated=_ratios([cell.estimated for cell in cells], outputs),
                measured=_ratios([cell.measured for cell in cells], outputs),
            )
        return Attribution(
            method=self._method(len(steps)),
            timesteps=steps,
            output=_ratios([one.both for one in whole], [one.signal for one in whole]),
            layers=layers,
            samples=self.samples,
            probes=self.probes,
            seconds=round(self.earlier + time.monotonic() - self.began, 3),
            left_out=self._left_out(),
        )

    def _method(self, steps: int) -> str:
        if not self.probes and self.measure == 0:
            return "errors of the layers' own outputs only: contributions were neither estimated nor measured"
        if not self.probes:
            return "contributions measured by quantizing one layer at a time"
        cell = math.sqrt(2 / (self.probes * self.samples))
        mean = cell / math.sqrt(max(steps, 1))
        return (
            f"estimates are of first order, from {self.probes} random gradients of {self.samples} samples per "
            f"timestep: standard deviation about {cell:.0%} for one timestep, {mean:.0%} for the mean"
        )

    def _left_out(self) -> dict[str, str]:
        out = {}
        missing = [f"{step:g}" for step in self.timesteps if step not in self.found]
        if missing and self.budget is not None:
            out[f"timesteps {', '.join(missing)}"] = f"the budget of {self.budget:g} s was spent"
        if self.short:
            out[_SHORT] = _ONLY_ESTIMATES + ", ".join(self.short)
        if self.apart_before:
            out[_APART_FROM_LAYERS] = self.apart_before
        if self.apart > _APART:
            out[_APART_FROM_LAYERS] = (
                "without quantized layers the graph still differs from the float model, by an error of "
                f"{self.apart:.0%} of the whole: a pass of another package quantizes, or the dtype rounds that much"
            )
        products = [name for name, layer in self.plan.layers.items() if layer.weight_bits and name not in self.names]
        if self.found and products:
            out[f"{len(products)} layers, such as {products[0]}"] = (
                "no measured call runs them, or a pass of another package replaced their op"
            )
        return out

    def _spent(self) -> float:
        return time.monotonic() - self.began


def _distance(model: nn.Module, spec: CallSpec, inputs: Sequence[Tensor], found: Tensor) -> float:
    """Energy of the difference between the output of the float model and another one."""
    with torch.no_grad():
        leaves = pytree.tree_leaves(model(**arguments_of(spec, inputs)))
    exact = next(leaf for leaf in leaves if isinstance(leaf, Tensor))
    return float((found.double() - exact.double()).square().sum())


def _calls(plan: Plan, model: nn.Module, inputs: Statistics | Callable[[], Any], most: int) -> KeptCalls:
    if isinstance(inputs, Statistics):
        if not len(inputs.calls):
            raise ConfigurationError(
                "the statistics kept no calls to run again; record them with fxquant.Statistics(keep_calls=32), or on "
                "the command line with --keep-statistics"
            )
        if inputs.run is not None:
            run = Run(class_path(model), weights_digest(model), plan.timestep)
            inputs.run.check_same(run, "the float model")
        return inputs.calls
    if not callable(inputs):
        raise ConfigurationError(
            f"inputs is a {type(inputs).__name__}; give statistics that kept calls, or a function that runs the model"
        )
    return record_calls(model, Architecture.of(model, plan.timestep), plan.calls, most, inputs)


def _check_options(timesteps: Any, samples: Any, probes: Any, measure: Any, budget: Any) -> None:
    if not isinstance(timesteps, int):
        check_type("timesteps", timesteps, Sequence, "a number of timesteps, or a list of timesteps")
        for step in timesteps:
            check_type("each of timesteps", step, Real, "a number")
    check_type("samples", samples, int, "a whole number")
    check_type("probes", probes, int, "a whole number")
    check_type("measure", measure, (int, NoneType), "a number of layers, or None for all")
    check_type("budget", budget, (Real, NoneType), "a number of seconds, or None for no limit")
    if (isinstance(timesteps, int) and timesteps < 1) or (not isinstance(timesteps, int) and not list(timesteps)):
        raise ConfigurationError(f"timesteps={timesteps!r} leaves nothing to measure; give 1 or more")
    if samples < 1:
        raise ConfigurationError(f"samples={samples} leaves nothing to measure; give 1 or more")
    if probes < 0 or (measure is not None and measure < 0):
        raise ConfigurationError(f"probes={probes} and measure={measure} should not be negative")
    if budget is not None and not budget > 0:
        raise ConfigurationError(f"budget={budget} is not a number of seconds; give a positive one, or None")


def _fingerprint(job: _Job, model: nn.Module, quantized: GraphModel) -> str:
    """A digest of everything that the result depends on."""
    options = (job.timesteps, job.samples, job.probes, job.measure, job.seed)
    found = hashlib.sha256(f"{job.plan.fingerprint()}{whole_digest(model)}{options}".encode())
    for graph in quantized.graphs:
        found.update(digest_of_code(graph).encode())
    for step in job.timesteps:
        for call in job.calls_at(step):
            for tensor in call.inputs:
                found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _add(found: dict[str, Energies], name: str, new: Energies) -> None:
    """Add the energies of a further kind of call. What was not measured for one kind is unknown for the sum."""
    old = found.get(name)
    if old is None:
        found[name] = new
        return
    old.signal, old.both = old.signal + new.signal, old.both + new.both
    for part in ("weights", "inputs", "estimated", "measured"):
        left, right = getattr(old, part), getattr(new, part)
        setattr(old, part, None if left is None or right is None else left + right)


def _ratios(parts: Sequence[float | None], wholes: Sequence[float]) -> tuple[float | None, ...]:
    """Each energy relative to its signal; None where nothing was measured, or where there is no signal."""
    pairs = zip(parts, wholes, strict=True)
    return tuple(None if part is None or whole <= 0 else part / whole for part, whole in pairs)
