"""Balance a float model for another quantizer: the same class and the same function, with fewer salient channels."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxquant.calibration.calibrate import Calibration, run_calibration
from fxquant.calibration.recorded import calibrate_from_statistics
from fxquant.calibration.samples import Sample
from fxquant.capture.threads import without_autocast
from fxquant.capture.trace import Architecture
from fxquant.errors import CalibrationError, ConfigurationError, ProofError, QualityWarning
from fxquant.export.balance_report import BalanceReport, balanced_layers
from fxquant.export.in_place import Rewritten, rewrite_in_place
from fxquant.export.limits import refuse_fused
from fxquant.ir.tensors import read_tensors
from fxquant.pipeline.pipeline import Instrument, Pass, Tier
from fxquant.pipeline.proving import relative_error, rounding_noise
from fxquant.pipeline.recipes import Recipe, make_recipe
from fxquant.planning.context import PassContext
from fxquant.planning.plan import Plan
from fxquant.runtime.float_model import (
    check_model,
    check_storage,
    check_weights,
    class_path,
    device_of,
    refuse_adapters,
    weights_digest,
)
from fxquant.runtime.parts import has_entries
from fxquant.statistics.collection import Statistics
from fxquant.statistics.kept_calls import Run

RECIPE = "smoothquant-w8a8"
"""The recipe whose balancing is used by default."""

_ROUNDINGS = 16.0  # An output may differ by this times what rounding all weights anew changes.
_IN_PLACE = "in-place"


def balance(
    model: Any,
    *,
    calibrate: Callable[[], Any] | None = None,
    recipe: str | Recipe = RECIPE,
    layers: str = "default",
    timestep: str | None = "timestep",
    measure: int = 4,
    statistics: Statistics | None = None,
    instruments: Sequence[Instrument] = (),
    prove: bool = False,
) -> nn.Module:
    """Return a float model of the same class that computes the same function and is easier to quantize.

    The channels of activations are balanced against the columns of weights, and the factors are absorbed into
    parameters that the model has. So the result is an ordinary model with the same keys: ``save_pretrained`` writes it,
    and any quantizer can take it. A layer stays as it is if its factors would need an additional op or tensor;
    ``balance_report`` of the result says for each layer what was done, or why nothing was.

    The result computes the same function for all kinds of call that calibration made. Calls of other kinds, which run
    other parts of the model, were not examined: calibrate with every kind of call that you will use.

    Args:
        model: A float diffusion transformer in evaluation mode, or a pipeline, of which ``transformer`` is taken. It
            does not change.
        calibrate: Any callable that runs the model the way it will be used. It can be left out if ``statistics`` are
            those of an earlier calibration of the same model.
        recipe: A name with a precision, or a :class:`~fxquant.pipeline.recipes.Recipe`. Only its passes that keep the
            function are used, such as the balancing of ``"ptq4dit-w8a8"``. ``"repq-w8a8"`` also shifts channels, where
            layers have biases. A precision with float activations, as in ``w4a16``, balances for rounded weights alone.
        layers: As for :func:`fxquant.compile`.
        timestep: Name of the ``forward`` argument that holds the timestep; None for a model without one.
        measure: Number of calibration calls on which the result is compared with the original, at least 1.
        statistics: Receives what calibration recorded, or replaces a calibration, as for :func:`fxquant.compile`.
        instruments: They watch every pass (:mod:`fxquant.pipeline.pipeline`).
        prove: Compare each pass in float64 as well, to a relative 1e-12; see :func:`fxquant.compile`.

    Returns:
        The balanced model, with a :class:`~fxquant.export.balance_report.BalanceReport` as ``balance_report``.

    Raises:
        AlreadyCompiledError: If the model is an fxquant model already.
        ConfigurationError: If the recipe balances nothing or needs timestep tables, options are out of range, or the
            model is unsuitable, as for :func:`fxquant.compile`.
        CalibrationError: If calibration is missing, fails, or reaches no layer.
        CaptureError: If the model cannot be traced.
        NonFiniteError: If a weight holds NaN or infinity, or a changed weight does not fit its dtype.
        ProofError: If the outputs differ by more than rounding. Nothing is returned then.
    """
    model = _transformer_of(model)
    chosen = _in_place(make_recipe(recipe, layers), str(recipe))
    _check(model, measure, calibrate, statistics)
    check_weights(model)
    calibration = _calibrated(model, chosen, calibrate, timestep, measure, statistics, instruments, prove)
    with without_autocast(device_of(model).type):
        found = rewrite_in_place(model, calibration, chosen.convert, instruments)
        balanced = _with_parameters(model, found)
        samples = calibration.chosen_samples()
        error = _compare(balanced, samples, calibration, found)
    context = PassContext(found.plan, calibration.statistics)
    report = BalanceReport(
        str(chosen),
        tuple(balanced_layers(context, calibration.plan)),
        tuple(sorted(found.changed)),
        error,
        len(samples),
        _unread(model, found),
    )
    balanced.balance_report = report  # type: ignore[assignment]
    _warn(report)
    return balanced


def _transformer_of(model: Any) -> Any:
    """The transformer of a pipeline; anything else as it is.

    Raises:
        ConfigurationError: If a pipeline has none, or two.
    """
    if isinstance(model, nn.Module) or not hasattr(model, "components"):
        return model
    found = getattr(model, "transformer", None)
    if found is None:
        raise ConfigurationError(
            f"{type(model).__name__} has no transformer; give the model to balance, such as pipe.unet or pipe.prior"
        )
    if getattr(model, "transformer_2", None) is not None:
        raise ConfigurationError(
            f"{type(model).__name__} has two transformers; balance both in one run with "
            "fxquant.balance_pipeline(pipe, calibrate=...), or give one of them"
        )
    return found


def _in_place(recipe: Recipe, said: str) -> Recipe:
    """The passes of a recipe that keep what a graph computes, limited to changes of parameters.

    Raises:
        ConfigurationError: If there are none, or they need tables over timesteps.
    """
    convert: list[Pass] = []
    for step in recipe.convert:
        if step.tier is Tier.LOSSY:
            continue
        if step.name == "group-timesteps" and getattr(step, "groups", 1) != 1:
            raise ConfigurationError(
                f"recipe {said} shifts channels by tables over the timesteps, which a float model of the same class "
                "cannot hold; use repq-w8a8, whose shifts do not depend on the timestep"
            )
        convert.append(step)
    if not any(_has_cost(step) for step in convert):
        raise ConfigurationError(
            f"recipe {said} balances nothing; use one that does, such as {RECIPE}, smoothquant-search-w8a8 or repq-w8a8"
        )
    made = Recipe(recipe.prepare, tuple(convert))
    for name in dict.fromkeys(step.name for step in convert if _has_cost(step)):
        made = made.with_options(name, dearest=_IN_PLACE)
    return made


def _has_cost(step: Pass) -> bool:
    return any(one.name == "dearest" for one in fields(step))  # type: ignore[arg-type]


def _check(model: Any, measure: int, calibrate: Any, statistics: Any) -> None:
    if has_entries(model):
        raise ConfigurationError(
            f"pipelines call the methods encode and decode of this {type(model).__name__}, and balancing follows one "
            "call; give a model with one entry, such as pipe.transformer"
        )
    check_model(model)
    refuse_adapters(model)
    check_storage(model)
    if not isinstance(measure, int) or measure < 1:
        raise ConfigurationError(f"measure={measure!r} is not a number of calls; the result is compared on 1 or more")
    if calibrate is None and not statistics:
        raise CalibrationError(
            "the salience of channels comes from calibration; pass calibrate=, a function that runs the model, such as "
            "lambda: pipe(class_labels=labels, num_inference_steps=25)"
        )
    refuse_fused(model)


def _calibrated(
    model: nn.Module,
    recipe: Recipe,
    calibrate: Callable[[], Any] | None,
    timestep: str | None,
    measure: int,
    statistics: Statistics | None,
    instruments: Sequence[Instrument],
    prove: bool,
) -> Calibration:
    run = Run(class_path(model), weights_digest(model), timestep)
    if statistics is not None and statistics.run is not None:
        statistics.run.check_same(run, "this model")
    plan = Plan(str(recipe), class_path(model), timestep)
    architecture = Architecture.of(model, timestep)
    calibration = Calibration(
        model,
        architecture,
        plan,
        recipe.prepare,
        recipe.convert,
        measure,
        instruments,
        statistics,
        check=plan.check,
        prove=prove,
    )
    if calibrate is None:
        with without_autocast(device_of(model).type):
            calibrate_from_statistics(calibration, device_of(model))
    else:
        run_calibration(calibration, model, calibrate)
    calibration.statistics.run = replace(run, step=plan.observed_step, later=plan.later_steps)
    if calibration.statistics.transient:
        calibration.statistics.seal()
    return calibration


def _with_parameters(model: nn.Module, found: Rewritten) -> nn.Module:
    """A copy of a model in which parameters have new values."""
    balanced = copy.deepcopy(model)
    parameters = dict(balanced.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, value in found.changed.items():
            parameters[name].copy_(value)
    return balanced


def _unread(model: nn.Module, found: Rewritten) -> tuple[str, ...]:
    """Names of the parameters that no graph reads, under none of their names."""
    read = {name for captured in found.graphs for name in read_tensors(captured.module)}
    used = {id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False) if name in read}
    return tuple(name for name, parameter in model.named_parameters() if id(parameter) not in used)


def _compare(balanced: nn.Module, samples: Sequence[Sample], calibration: Calibration, found: Rewritten) -> float:
    """The largest relative error of the outputs of the balanced model.

    Raises:
        ProofError: If it is not explained by rounding.
    """
    error, worst = 0.0, samples[0]
    for sample in samples:
        with torch.no_grad():
            output = balanced(**sample.arguments)
        first = next(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))
        if (own := relative_error(first, sample.output)) > error:
            error, worst = own, sample
    if error == 0:
        return error
    call = calibration.architecture.canonical((), worst.arguments)
    graph = next(one for one in calibration.prepared if one.call.fits(call))
    # A float64 model may compute a part in float32.
    values = (node.meta.get("val") for node in graph.module.graph.nodes)
    dtypes = {one.dtype for one in values if isinstance(one, Tensor) and one.is_floating_point()}
    least = max(torch.finfo(dtype).eps for dtype in dtypes)
    allowed = _ROUNDINGS * rounding_noise(graph.module, graph.inputs(call.leaves), least)
    if error > allowed:
        raise ProofError(
            f"the balanced model computes something else: at timestep {worst.timestep:g} an output is off by "
            f"{error:.1e} of its largest element, and rounding the weights explains {allowed:.1e}. The model may read "
            "a parameter in a way that its graph does not show. Your model is unchanged; balance fewer layers with "
            "layers='blocks', or report this",
            found.plan.recipe,
            error,
        )
    return error


def _warn(report: BalanceReport) -> None:
    if not report.parameters:
        reason = next((layer.reason for layer in report.layers if layer.reason is not None), "no layer is salient")
        warnings.warn(f"nothing could be balanced: {reason}", QualityWarning, stacklevel=3)
    elif report.unread:
        warnings.warn(
            f"{len(report.unread)} parameters were not read by calibration, such as {report.unread[0]!r}; calls that "
            "read them may not compute the same as before. Calibrate with calls of every kind that you will use",
            QualityWarning,
            stacklevel=3,
        )
