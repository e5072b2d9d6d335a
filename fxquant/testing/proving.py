"""Proof of one pass on a model: its tier, what it keeps in the plan, and that it never reads the values of weights."""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx, nn

from fxquant.calibration.calibrate import Calibration, run_calibration
from fxquant.capture.fidelity import other_values
from fxquant.capture.graph import CapturedGraph
from fxquant.capture.trace import Architecture
from fxquant.errors import ConfigurationError, FxquantError, ProofError
from fxquant.ir.digest import graph_digest
from fxquant.ir.printing import graph_text
from fxquant.ir.tensors import bind, weights_of
from fxquant.pipeline.pipeline import Pass, Pipeline, parse_pass
from fxquant.pipeline.proving import Proof, Prover, rewrite
from fxquant.pipeline.recipes import Recipe
from fxquant.planning.context import PassContext
from fxquant.planning.plan import Plan
from fxquant.runtime.float_model import class_path
from fxquant.statistics.collection import Statistics
from fxquant.testing import models

Calls = Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""Keyword arguments of one call of a model, or of several calls of one kind."""

BEFORE = "assign-precision ; "
"""The passes that run before a pass that is tried alone: every block linear is to become W8A8."""

_OTHERS = 3  # Calls with other values on which a pass is proved, besides the given ones.


@dataclass
class Trial:
    """One pass on the graph of a model, as a conversion runs it.

    Attributes:
        step: The pass.
        before: The graph just before the pass.
        after: The graph after it.
        context: What the pass was given; ``context.plan`` holds its decisions.
        edits: Number of changes that it made.
        decided: Whether it changed the plan.
        calls: Inputs of the graph for the given calls, and for calls like them with other values.
    """

    step: Pass
    before: fx.GraphModule
    after: fx.GraphModule
    context: PassContext
    edits: int
    decided: bool
    calls: list[list[Tensor]]
    prover: Prover
    replays: _Replays

    @property
    def plan(self) -> Plan:
        """The plan after the pass."""
        return self.context.plan


@dataclass
class _Replays:
    """Makes the graph of the model again, with or without weights."""

    traced: CapturedGraph
    weights: dict[str, Tensor]
    passes: tuple[Pass, ...]

    def capture(self, with_weights: bool = True) -> CapturedGraph:
        captured = self.traced.copy()
        if with_weights:
            bind(captured.module, self.weights)
        return captured

    def run(self, plan: Plan, with_weights: bool) -> tuple[fx.GraphModule, Plan]:
        """The graph after all passes, which carry out a copy of the plan."""
        module, plan = self.capture(with_weights).module, copy.deepcopy(plan)
        Pipeline(self.passes).run(module, PassContext(plan))
        return module, plan


def try_pass(
    step: Pass | str,
    model: nn.Module,
    inputs: Calls,
    *,
    before: str | Recipe = BEFORE,
    timestep: str | None = "timestep",
) -> Trial:
    """Run one pass on the captured graph of a model, after calibration with the given calls.

    Args:
        step: The pass, or its text.
        model: A float model in evaluation mode; it does not change.
        inputs: Keyword arguments of one call, or of several; calibration records what they give.
        before: Passes that run before, as the text of a recipe: those before the semicolon run before calibration.
        timestep: Name of the input that holds the timestep. None for a model without one: nothing is observed then.

    Raises:
        FxquantError: Whatever a pass raises.
    """
    step = parse_pass(step) if isinstance(step, str) else step
    recipe = before if isinstance(before, Recipe) else _recipe_of(before)
    calls = [dict(inputs)] if isinstance(inputs, Mapping) else [dict(call) for call in inputs]
    if not calls:
        raise ConfigurationError("a pass is tried on calls of the model, and there are none; give example_calls(model)")
    architecture = Architecture.of(model, timestep)
    plan = Plan(str(recipe), class_path(model), timestep)
    traced = architecture.capture(architecture.canonical((), calls[0]))
    replays = _Replays(traced, weights_of(model), (*recipe.prepare, *recipe.convert, step))
    if timestep is None:
        captured, statistics = replays.capture(), None
        Pipeline(recipe.prepare).run(captured.module, plan)
    else:
        calibration = Calibration(
            model, architecture, plan, recipe.prepare, (*recipe.convert, step), 0, statistics=Statistics()
        )
        run_calibration(calibration, model, models.calibration(model, calls))
        plan.timesteps = calibration.statistics.timesteps.tolist()
        captured, statistics = calibration.prepared[0], calibration.statistics
    plan.calls = [captured.call]
    leaves = [architecture.canonical((), call).leaves for call in calls]
    leaves += [other_values(captured.call, leaves[0], timestep, seed) for seed in range(1, _OTHERS + 1)]
    graph_inputs = [captured.inputs(each) for each in leaves]
    context = PassContext(plan, statistics, inputs=graph_inputs[: len(calls)])
    earlier_passes = Pipeline(recipe.convert)
    earlier_passes.run(captured.module, context)
    prover, earlier = Prover(step, captured.module, context), copy.deepcopy(plan)
    (record,) = Pipeline([step]).run(captured.module, context, earlier_passes.stage)
    decided = plan != earlier
    return Trial(step, prover.before, captured.module, context, record.edits, decided, graph_inputs, prover, replays)


def _recipe_of(text: str) -> Recipe:
    """A recipe from its text, or from that of its passes before calibration alone; options may hold semicolons too."""
    try:
        return Recipe.parse(text)
    except ConfigurationError:
        return Recipe.parse(f"{text} ; ")


def prove(
    step: Pass | str,
    model: nn.Module,
    inputs: Calls,
    *,
    before: str | Recipe = BEFORE,
    timestep: str | None = "timestep",
) -> Proof:
    """Prove that a pass does what its tier says, on the graph of a model.

    The outputs of the graph before and after the pass are compared on the given calls and on calls like them with other
    values: bit for bit for an exact pass; in float64, to a relative 1e-12, for an algebraic pass; for a lossy pass the
    signal to quantization noise ratio is measured. Besides:

    - The pass changes the graph or the plan.
    - A second run changes nothing.
    - With its decisions in the plan, and without calibration, it makes the same graph, and decides nothing anew.
    - It does so on a graph whose weights have no values: it does not read values of weights.

    Arguments and errors are those of :func:`try_pass`.

    Raises:
        ProofError: Names the pass, its tier, the error and the first node whose value differs.
    """
    trial = try_pass(step, model, inputs, before=before, timestep=timestep)
    if not trial.edits and not trial.decided:
        raise _refused(trial.step, f"it changed neither the graph nor the plan of {type(model).__name__}: no match")
    proof = trial.prover.check(trial.after, trial.edits, trial.calls)
    checked = [_check_second_run(trial), _check_replay(trial), _check_without_weights(trial)]
    return replace(proof, checked=tuple(checked))


def assert_not_fired(
    step: Pass | str,
    model: nn.Module,
    inputs: Calls,
    reason: str | None = None,
    *,
    before: str | Recipe = BEFORE,
    timestep: str | None = "timestep",
) -> None:
    """Assert that a pass leaves the graph of a model alone: a shared reader, a wrong axis, a layout it does not know.

    Args:
        step: The pass, or its text.
        model: A float model in evaluation mode.
        inputs: As for :func:`try_pass`, like the options.
        reason: Part of a text that the pass should write into the plan, such as the ``reason`` of a decision.
        before: As for :func:`try_pass`.
        timestep: As for :func:`try_pass`.

    Raises:
        AssertionError: If the pass changed the graph, or gave no such reason.
    """
    trial = try_pass(step, model, inputs, before=before, timestep=timestep)
    before_text, after_text = graph_text(trial.before, notes=True), graph_text(trial.after, notes=True)
    if trial.edits or before_text != after_text:
        diff = difflib.unified_diff(before_text.splitlines(), after_text.splitlines(), "before", "after", lineterm="")
        raise AssertionError(
            f"pass {trial.step} made {trial.edits} edits, but should have left this graph alone:\n" + "\n".join(diff)
        )
    if reason is not None:
        told = json.dumps(trial.plan.to_json(), ensure_ascii=False, default=str)
        if reason not in told:
            raise AssertionError(f"pass {trial.step} left the graph alone, but the plan does not say {reason!r}")


def _check_second_run(trial: Trial) -> str:
    step, before = trial.step, graph_text(trial.after)
    context = trial.context.for_trial()
    edits = rewrite(step, trial.after, context)
    if edits or graph_text(trial.after) != before:
        raise _refused(step, f"a second run on the same graph makes {edits} edits; skip what is rewritten already")
    if context.plan != trial.plan:
        raise _refused(step, "a second run changes the plan; decide only what the plan does not hold")
    return "a second run changes nothing"


def _check_replay(trial: Trial) -> str:
    try:
        module, plan = trial.replays.run(trial.plan, with_weights=True)
    except FxquantError as error:
        raise _refused(trial.step, f"with the plan alone, without calibration, it fails: {error}") from error
    if graph_digest(module.graph) != graph_digest(trial.after.graph):
        raise _refused(trial.step, "with the plan alone it makes another graph; write every decision into the plan")
    if plan != trial.plan:
        raise _refused(trial.step, "with the plan alone it decides something anew; read every decision from the plan")
    return "the plan alone gives the same graph"


def _check_without_weights(trial: Trial) -> str:
    advice = "decide from the plan, from statistics and from shapes, and compute with tensors without reading them"
    try:
        module, _ = trial.replays.run(trial.plan, with_weights=False)
    except FxquantError as error:
        what = "on weights without values, as a checkpoint is loaded, it fails"
        raise _refused(trial.step, f"{what}: {error}; {advice}") from error
    if graph_digest(module.graph) != graph_digest(trial.after.graph):
        raise _refused(trial.step, f"it makes another graph if weights have no values; {advice}")
    return "weights are not read"


def _refused(step: Pass, what: str) -> ProofError:
    return ProofError(f"pass {step}: {what}", str(step))
