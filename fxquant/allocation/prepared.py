"""A model that is calibrated once and quantized in several precisions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxquant import api
from fxquant.allocation.candidates import Candidate, possible, precision_of_recipe, varied_layers, with_candidates
from fxquant.calibration.kept_calls import some_inputs
from fxquant.calibration.recorded import arguments_of, inputs_on
from fxquant.calibration.samples import KEPT_SAMPLES, Sample
from fxquant.capture.calls import CallSpec
from fxquant.disk.finished_work import FinishedWork
from fxquant.errors import CalibrationError, ConfigurationError, check_type
from fxquant.inspect.errors.schedule import calls_at
from fxquant.pipeline.backend import Backend
from fxquant.pipeline.recipes import Recipe, has_precision, make_recipe
from fxquant.planning.branches import branch_rank
from fxquant.planning.plan import Plan
from fxquant.planning.precision import FLOAT, Precision
from fxquant.planning.roundings import Roundings
from fxquant.planning.sensitivities import FLOAT_BITS
from fxquant.runtime.float_model import device_of
from fxquant.runtime.model import GraphModel
from fxquant.statistics.collection import Statistics


@dataclass(eq=False)
class Prepared:
    """A model in every precision.

    Attributes:
        model: The float model.
        statistics: What its calibration recorded, with kept calls.
        recipe: The recipe of the first quantized model.
        base: The first quantized model, which decided the factors.
        precisions: The candidates by name, without float.
        layers: The layers whose precision is varied, each with the precisions that it can have.
        roundings: The weights rounded so far. Each was rounded in all precisions at once.
        left_out: Which layers cannot have which precision.
        work: Keeps rounded layers; None to keep nothing.
    """

    model: nn.Module
    statistics: Statistics
    recipe: Recipe
    base: GraphModel
    precisions: dict[str, Candidate]
    layers: dict[str, list[str]]
    roundings: Roundings
    left_out: dict[str, str] = field(default_factory=dict)
    work: FinishedWork | None = None

    def plan_of(self, precision: str) -> Plan:
        """The plan with every layer in one precision, also float, if it can have it."""
        assert self.base.plan is not None
        wanted = self.precisions.get(precision, Candidate(FLOAT))
        return with_candidates(self.base.plan, {name: wanted for name, own in self.layers.items() if precision in own})

    def quantized(self, precision: str) -> GraphModel:
        """The model with every layer in one precision, if it can have it.

        Raises:
            ConfigurationError: If the precision quantizes inputs that calibration of the recipe did not record.
        """
        candidate = self.precisions[precision]
        if candidate == Candidate(precision_of_recipe(self.recipe)):
            return self.base
        try:
            return self.compile(self.plan_of(precision))
        except CalibrationError as error:
            begun = precision_of_recipe(self.recipe)
            if begun.activation_bits is not None or candidate.precision.activation_bits is None:
                raise
            raise ConfigurationError(
                f"candidate {precision} quantizes inputs, and calibration did not record all of them, because the "
                f"recipe begins from {begun}, which keeps them float ({str(error).splitlines()[0]}); begin from a "
                "recipe that quantizes inputs, such as w4a8, or leave this candidate out"
            ) from error

    def compile(self, plan: Plan, backend: str | Backend = "fake-quant") -> GraphModel:
        """The model with a plan that differs from the base's in precisions only."""
        with self.roundings.used_with(self.statistics):
            return api.compile(
                self.model,
                plan=plan,
                statistics=self.statistics,
                backend=backend,
                measure=0,
                resume=_folder(self.work, f"candidate-{plan.fingerprint()[:12]}"),
            )


def prepare(
    model: nn.Module,
    recipe: str | Recipe,
    candidates: Sequence[str],
    calibrate: Callable[[], Any] | None,
    statistics: Statistics | None,
    layers: str,
    timestep: str | None,
    most_calls: int,
    work: FinishedWork | None = None,
) -> Prepared:
    """Calibrate if necessary, and quantize the model in the middle one of the precisions.

    Raises:
        ConfigurationError: If the candidates are not precisions, or the statistics kept no calls.
    """
    check_type("candidates", candidates, Sequence, "a list of precisions, such as ['w4a8', 'w8a8']")
    check_type("statistics", statistics, (Statistics, NoneType), "the statistics of a calibration")
    if isinstance(candidates, str):
        raise ConfigurationError(f"candidates should be a list of precisions, such as [{candidates!r}, 'w8a8']")
    found = {str(candidate): candidate for candidate in map(Candidate.parse, candidates)}
    quantizing = {name: candidate for name, candidate in found.items() if candidate.precision != FLOAT}
    if not quantizing:
        raise ConfigurationError("there is no precision to compare; give candidates, such as ['w4a8', 'w8a8']")
    if statistics is None:
        statistics = Statistics(keep_calls=most_calls)
    if calibrate is None and not len(statistics.calls):
        raise ConfigurationError(
            "errors are measured on kept calls of the model, and there are none; give calibrate=, or statistics that "
            "were recorded with fxquant.Statistics(keep_calls=64)"
        )
    chosen = begun_from(recipe, list(dict.fromkeys(one.precision for one in quantizing.values())), layers)
    _check_ranks(quantizing, chosen)
    roundings = Roundings(_wanted(precision_of_recipe(chosen), list(quantizing.values())))
    with roundings.used_with(statistics):
        base = api.compile(
            model,
            recipe=chosen,
            calibrate=calibrate,
            statistics=statistics,
            measure=0,
            timestep=timestep,
            resume=_folder(work, "conversion"),
        )
    if not len(statistics.calls):
        raise ConfigurationError("these statistics keep no calls; record them with fxquant.Statistics(keep_calls=64)")
    plan = base.plan
    assert plan is not None
    own = varied_layers(plan, precision_of_recipe(chosen))
    if not own:
        raise ConfigurationError("the recipe quantizes no linear with its own precision, so there is nothing to vary")
    made = Prepared(model, statistics, chosen, base, quantizing, {name: [] for name in own}, roundings, work=work)
    for text, candidate in quantizing.items():
        refused = {name: reason for name in own if (reason := possible(plan, name, candidate)) is not None}
        for name in own:
            if name not in refused:
                made.layers[name].append(text)
        if refused:
            name, reason = next(iter(refused.items()))
            reasons = [line.strip() for line in reason.splitlines()]
            made.left_out[f"{text} in {len(refused)} layers, such as {name}"] = next(
                line for line in (*reasons[1:], reasons[0]) if line
            )
    if FLOAT_BITS in found:
        for name in own:
            made.layers[name].append(FLOAT_BITS)
    return made


def _folder(work: FinishedWork | None, name: str) -> Path | None:
    """The folder of a conversion."""
    return None if work is None else work.folder / name


def _check_ranks(candidates: Mapping[str, Candidate], recipe: Recipe) -> None:
    """Refuse ranks where the recipe makes no branches.

    Raises:
        ConfigurationError: Names the candidate.
    """
    ranked = next((name for name, one in candidates.items() if one.rank is not None), None)
    if ranked is not None and not any(step.name == "split-low-rank" for step in recipe.convert):
        raise ConfigurationError(
            f"candidate {ranked} names the rank of a branch, and the recipe has no pass split-low-rank; begin from a "
            "recipe that has it, such as svdquant, or leave out the rank"
        )


def _wanted(base: Precision, candidates: list[Candidate]) -> Callable[[Plan, str], list[Precision]]:
    """The precisions in which a layer will be compared: all that it can have, if it is one of those that vary.

    Beside another branch it has another weight to round, which is not rounded here for the candidates of this one.
    """

    def wanted(plan: Plan, name: str) -> list[Precision]:
        layer = plan.layer(name)
        if layer.kind != "linear" or layer.precision != base:
            return []
        rank = branch_rank(plan, name)
        alike = [one for one in candidates if one.rank in (None, rank) and possible(plan, name, one) is None]
        return list(dict.fromkeys(one.precision for one in alike if one.precision != base))

    return wanted


def samples_of(prepared: Prepared) -> list[Sample]:
    """A few samples of a kept call of each kind at each timestep, with the float model's output."""
    kept, found = prepared.statistics.calls, []
    specs = [CallSpec.from_json(kind) for kind in kept.kinds]
    for step in sorted({call.timestep for call in kept}, reverse=True):
        for call in calls_at(kept, step):
            spec = specs[call.kind]
            inputs = some_inputs(spec, inputs_on(call, spec, device_of(prepared.model)), KEPT_SAMPLES)
            arguments = arguments_of(spec, inputs)
            with torch.no_grad():
                leaves = pytree.tree_leaves(prepared.model(**arguments))
            output = next(leaf for leaf in leaves if isinstance(leaf, Tensor))
            found.append(Sample(step, arguments, output))
    return found


def begun_from(recipe: str | Recipe, precisions: list[Precision], layers: str) -> Recipe:
    """The recipe with the middle one of the precisions, of those with quantized activations if there are any."""
    if isinstance(recipe, Recipe) or ";" in recipe:
        return make_recipe(recipe, layers)
    whole = [
        one for one in precisions if one.weight_format is None and not one.group_size
    ] or precisions  # Fit anywhere.
    coded = [one for one in whole if one.activation_bits is not None] or whole
    ordered = sorted(coded, key=lambda one: (one.weight_bits or 16, one.activation_bits or 16))
    return make_recipe(recipe if has_precision(recipe) else f"{recipe}-{ordered[len(ordered) // 2]}", layers)
