"""The entry points for users: trace a model, or compile it to a quantized model."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxquant.calibration.calibrate import Calibration, run_calibration
from fxquant.calibration.journal import Journal
from fxquant.calibration.recorded import calibrate_from_statistics
from fxquant.calibration.samples import output_sqnr
from fxquant.capture.hooks import hand_on_hooks
from fxquant.capture.rebuilding import warn_if_not_rebuilt
from fxquant.capture.threads import without_autocast
from fxquant.capture.trace import Architecture
from fxquant.disk.finished_work import FinishedWork, working_in
from fxquant.errors import (
    CalibrationError,
    ConfigurationError,
    QualityWarning,
    check_type,
)
from fxquant.ir.tensors import weights_of
from fxquant.memory.bound import limit_memory, place_weights
from fxquant.pipeline.backend import Backend, resolve_backend
from fxquant.pipeline.dumps import with_dumps
from fxquant.pipeline.pipeline import Instrument
from fxquant.pipeline.recipes import Recipe, make_recipe
from fxquant.planning.plan import Plan, tensor_bytes
from fxquant.runtime.float_model import (
    check_model,
    check_storage,
    check_weights,
    class_path,
    device_of,
    dtype_of,
    refuse_adapters,
    weights_digest,
)
from fxquant.runtime.model import GraphModel
from fxquant.runtime.offloading import meanwhile_on_its_device
from fxquant.runtime.parts import has_entries
from fxquant.runtime.replay import convert, replay
from fxquant.runtime.tracing import traced
from fxquant.statistics.collection import Statistics
from fxquant.statistics.kept_calls import Run

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from fxquant.distributed.team import Team

_POOR_DB = 10.0


def trace(model: nn.Module, *, timestep: str | None = "timestep") -> GraphModel:
    """Wrap a diffusion transformer as FX graphs, without changing what it computes.

    A graph is captured when a call needs one. Images made with the result equal the model's images bit for bit. Each
    graph is compared with the model on other inputs, which costs one call of each. Functions that are decorated with
    ``torch.compile`` are captured as they run without it.

    Args:
        model: A diffusion transformer in evaluation mode. Its weights are shared, not copied.
        timestep: Name of the ``forward`` argument that holds the timestep, or None.

    Raises:
        AlreadyCompiledError: If the model is an fxquant model already.
        ConfigurationError: If ``model`` is not a model, or a module in it is in training mode, went through
            ``torch.compile``, or has hooks that a graph cannot have (offloading, casting, step caches).
    """
    check_model(model)
    made = traced(model, timestep)
    hand_on_hooks(model, made)
    return made


@meanwhile_on_its_device
def compile(
    model: nn.Module,
    *,
    recipe: str | Recipe | None = None,
    backend: str | Backend = "fake-quant",
    calibrate: Callable[[], Any] | None = None,
    plan: Plan | None = None,
    layers: str = "default",
    timestep: str | None = "timestep",
    measure: int = 8,
    statistics: Statistics | None = None,
    instruments: Sequence[Instrument] = (),
    resume: str | Path | None = None,
    prove: bool = False,
    group: ProcessGroup | None = None,
    max_memory: int | str | None = None,
    scratch: str | Path | None = None,
) -> GraphModel:
    """Quantize a diffusion transformer. As ``torch.compile`` does, it takes a module and returns a drop-in module.

    The graph is captured from the first call that ``calibrate`` makes. While ``calibrate`` runs, the model's calls go
    through a graph with observers. When it returns, the model is restored. The quantized model shares the tensors that
    stayed float.

    Args:
        model: A diffusion transformer in evaluation mode, such as ``pipe.transformer``.
        recipe: A name with a precision, such as ``"ptq4dit-w4a8"``, or a :class:`~fxquant.pipeline.recipes.Recipe`.
        backend: ``"fake-quant"``, another registered name, or a backend.
        calibrate: Any callable that runs the model the way it will be used. It can be left out if ``statistics`` are
            those of an earlier calibration of the same model that observed what this recipe needs.
        plan: Replaces recipe and calibration: a plan from an earlier run, edited or not, to apply again. The quantized
            model gets a copy of it.
        layers: ``"default"`` (transformer blocks; embedders with float arithmetic and 8-bit weights), ``"blocks"``
            (embedders entirely float) or ``"all"``.
        timestep: Name of the ``forward`` argument that holds the timestep. None for a model that has none, such as a
            text encoder; then recipes that group timesteps or shift channels are refused.
        measure: Number of calibration calls on which the output error is measured afterwards; 0 for none.
        statistics: Receives what the observers record, for inspection, for later conversions or to merge runs; a new
            object if None. With a plan, or without ``calibrate``: the statistics of an earlier calibration, from which
            the recipe decides. Roundings that use more than the weights (GPTQ, reconstruction) need them with a plan.
        instruments: They watch every pass: timing, dumps, reproducers (:mod:`fxquant.pipeline.pipeline`). The
            environment variable ``FXQUANT_DUMP`` names a folder for dumps of all graphs after every change.
        resume: Folder that keeps what is finished: calls of the calibration, rounded layers, branches of low rank,
            reconstructed blocks. After an interruption the same call with the same folder continues from there, and
            returns what an uninterrupted run does, bit for bit. Results of other weights, inputs, options or versions
            are not used; a ``ResumeWarning`` names what differs.
        prove: Run the graph before and after each pass on calibration calls, and refuse a pass that does not keep its
            tier: the same bits for an exact pass, the same outputs in float64 to a relative 1e-12 for an algebraic one.
            For those who write passes. It costs several calls of the model per pass, and memory for its weights in
            float64; without that memory float32 or the model's own dtype is used, with a tolerance for rounding. In 16
            bits this tolerance can hide a mistake in a small layer, and a ``ProofWarning`` says so.
        group: A process group, such as ``torch.distributed.group.WORLD``, whose ranks quantize the model together. All
            of them call this function, with the same options and model; ``calibrate`` of each rank makes only
            its share of the calls. All ranks end with the same statistics, plan and codes (``docs/distributed.md``).
            None: this process works alone, also if there are process groups.
        max_memory: A bound on the memory of this process: bytes, or a text such as ``"8GB"``. Large tensors lie in
            memory-mapped files meanwhile: the weights in those that they were loaded from, all others in files in
            ``scratch``. The result is the same bit for bit. For loading and saving within the same bound, enter
            :func:`fxquant.limit_memory` instead. On Linux, for models on the CPU.
        scratch: Folder for these files; by default ``resume``, or the folder of temporary files.

    A model that ``pipe.enable_model_cpu_offload()`` offloads is on its device meanwhile, and the quantized model is
    offloaded in its place.

    Returns:
        The quantized model, to put in the pipeline in place of ``model``.

    Raises:
        AlreadyCompiledError: If the model is an fxquant model already.
        ConfigurationError: If options contradict each other or are out of range, a module is in training mode, went
            through ``torch.compile``, or has hooks that a graph cannot have (offloading by tensors, casting, caches).
        UnknownNameError: If there is no such recipe or backend.
        CalibrationError: If calibration is missing, fails, or reaches no layer.
        MissingTimestepError: If the model has no input of the name ``timestep``.
        CaptureError: If the model cannot be traced.
        NonFiniteError: If a weight or activation holds NaN or infinity.
        RanksDifferError: If the ranks of ``group`` have other models, options or versions.
        RankError: If another rank of ``group`` failed or died; names it.
        BackendError: If the backend cannot run what the recipe requires.
        MemoryLimitError: If ``max_memory`` is too small for the largest layer; the message says what would do.
        PassError: If a pass fails; with ``prove`` a ProofError if it does not keep its tier.
        FolderInUseError: If another process works in the folder ``resume``.
        WriteError: If the folder ``resume`` cannot be written, for example because its disk is full.
    """
    if max_memory is not None:
        given = {**locals(), "max_memory": None}
        with limit_memory(max_memory, resume if scratch is None else scratch):
            return compile(**given)
    instruments = with_dumps(instruments)
    if has_entries(model):
        raise ConfigurationError(
            f"pipelines call the methods encode and decode of this {type(model).__name__}, and a graph has one entry; "
            "fxquant.compile_parts quantizes its decoder and its encoder, and it stays a model of its class"
        )
    check_model(model)
    refuse_adapters(model)
    _check_options(recipe, backend, plan, measure, statistics)
    check_type("resume", resume, (str, Path, NoneType), "the path of a folder")
    check_storage(model)
    device = device_of(model)
    runner = resolve_backend(backend).on(device)
    runner.check_device(device)
    name = timestep if plan is None else plan.timestep
    place_weights(model, device)
    run = Run(class_path(model), weights_digest(model), name)
    if statistics is not None and statistics.run is not None:
        statistics.run.check_same(run, "this model")
    if plan is not None:
        _check_prepared(statistics, Recipe.parse(plan.recipe))
        if recipe is not None or calibrate is not None:
            raise ConfigurationError("give either a plan, or a recipe with calibrate")
        if prove:
            raise ConfigurationError("passes are proved on calibration calls; give a recipe with calibrate, not a plan")
        check_weights(model)
        with without_autocast(device.type), working_in(resume) as workspace:
            replayed = replay(model, copy.deepcopy(plan), runner, instruments, statistics, workspace)
        hand_on_hooks(model, replayed)
        return replayed
    if recipe is None:
        raise ConfigurationError('compile needs a recipe, such as recipe="ptq4dit-w8a8", or a plan')
    chosen = make_recipe(recipe, layers)
    _check_prepared(statistics, chosen)
    if calibrate is None and not statistics:
        raise CalibrationError(
            "static activation ranges come from calibration, and the graph from its first call; pass calibrate=, "
            "a function that runs the model, such as lambda: pipe(class_labels=labels, num_inference_steps=25)"
        )
    options = Options(chosen, runner, layers, timestep, measure, prove)
    team = None if group is None else _team(group, device, run, options, statistics)
    with contextlib.nullcontext() if team is None else team:
        return _converted(model, options, calibrate, statistics, instruments, resume, run, team)


@dataclass(frozen=True)
class Options:
    """Checked options of a conversion."""

    recipe: Recipe
    backend: Backend
    layers: str
    timestep: str | None
    measure: int
    prove: bool


def _converted(
    model: nn.Module,
    options: Options,
    calibrate: Callable[[], Any] | None,
    statistics: Statistics | None,
    instruments: Sequence[Instrument],
    resume: str | Path | None,
    run: Run,
    team: Team | None,
) -> GraphModel:
    chosen, runner, timestep, device = options.recipe, options.backend, options.timestep, device_of(model)
    weights = weights_of(model)
    check_weights(model)
    warn_if_not_rebuilt(model, timestep)
    architecture = Architecture.of(model, timestep)

    def start(statistics: Statistics | None) -> Calibration:
        plan = Plan(str(chosen), class_path(model), timestep)
        plan.backend = runner.name

        def check() -> None:
            plan.check()
            runner.check(plan)

        passes, measure, prove = (chosen.prepare, chosen.convert), options.measure, options.prove
        made = Calibration(model, architecture, plan, *passes, measure, instruments, statistics, check, prove)
        made.alone = team is None
        return made

    with working_in(_own_folder(resume, team)) as workspace:
        if calibrate is None:
            calibration = start(statistics)
            with without_autocast(device.type):
                calibrate_from_statistics(calibration, device)
        elif team is None:
            calibration = start(statistics)
            _keep_calls(calibration, workspace, run)
            run_calibration(calibration, model, calibrate)
        else:
            from fxquant.calibration.on_ranks import calibrate_on_ranks

            recorded = Statistics(transient=True) if statistics is None else statistics
            calibration = calibrate_on_ranks(
                start, model, calibrate, recorded, team, lambda own: _keep_calls(own, workspace, run)
            )
        made = calibration.plan
        sampled = replace(run, step=made.observed_step, later=made.later_steps)
        calibration.statistics.run = replace(sampled, prepared=chosen.may_change_inputs)
        made.calls = [captured.call for captured in calibration.prepared]
        made.timesteps = calibration.statistics.timesteps.tolist()
        if calibration.statistics.transient:
            calibration.statistics.seal()
        made.bytes_before = tensor_bytes(weights)
        with without_autocast(device.type):
            quantized = convert(calibration, chosen, runner, dtype_of(model), instruments, workspace, team)
    made.bytes_after = tensor_bytes(quantized.tensors())
    made.output_sqnr_db = output_sqnr(quantized, calibration.chosen_samples(), team)
    hand_on_hooks(model, quantized)
    _warn_if_poor(made)
    return quantized


def _own_folder(resume: str | Path | None, team: Team | None) -> Path | None:
    """The folder in which this process keeps what it has finished."""
    if resume is None or team is None:
        return None if resume is None else Path(resume)
    return Path(resume) / f"rank-{team.rank}-of-{team.size}"


def _keep_calls(calibration: Calibration, workspace: FinishedWork | None, run: Run) -> None:
    if workspace is not None:
        room, recipe = workspace.room("calibration"), calibration.plan.recipe
        kept = calibration.statistics, calibration.compute, calibration.identity
        calibration.journal = Journal(room, run, recipe, *kept)


def _team(
    group: ProcessGroup, device: torch.device, run: Run, options: Options, statistics: Statistics | None
) -> Team | None:
    """The ranks of a group, which were given the same; None if there is one.

    Raises:
        RanksDifferError: If they were given something else.
    """
    from fxquant.distributed.agreement import check_alike, versions
    from fxquant.distributed.team import Team

    team = Team(group, device)
    given: dict[str, object] = {"class of the model": run.model_class, "digest of the weights": run.weights}
    given |= vars(options) | {"backend": options.backend.name}
    if statistics is not None:
        before = statistics.num_rows, statistics.seed, statistics.calls.most, statistics.calls.seen, list(statistics)
        given["statistics"] = before
    check_alike(team, versions() | given)
    return team if team.size > 1 else None


def _check_options(recipe: Any, backend: Any, plan: Any, measure: Any, statistics: Any) -> None:
    if not isinstance(recipe, (str, Recipe, type(None))):
        raise ConfigurationError(f"a recipe is a name, such as 'rtn-w8a8', or a Recipe, not a {type(recipe).__name__}")
    if not isinstance(backend, (str, Backend)):
        raise ConfigurationError(
            f"a backend is a name, such as 'fake-quant', or a Backend, not a {type(backend).__name__}"
        )
    if not isinstance(plan, (Plan, type(None))):
        raise ConfigurationError(f"plan is a {type(plan).__name__}; read one from a folder with fxquant.Plan.load")
    if not isinstance(measure, int) or measure < 0:
        raise ConfigurationError(f"measure={measure!r} is not a number of calls; give 0 for none, or a positive number")
    if not isinstance(statistics, (Statistics, type(None))):
        raise ConfigurationError(f"statistics is a {type(statistics).__name__}; make one with fxquant.Statistics()")


def _check_prepared(statistics: Statistics | None, recipe: Recipe) -> None:
    if statistics is not None and statistics.run is not None:
        statistics.run.check_prepared(recipe.may_change_inputs, "this recipe")


def _warn_if_poor(plan: Plan) -> None:
    values = list(plan.output_sqnr_db.values())
    if values and sum(values) / len(values) < _POOR_DB:
        warnings.warn(
            f"the quantized model's output has {sum(values) / len(values):.1f} dB SQNR against float; images will "
            "differ visibly. More weight bits, groups (-g64) or another recipe help; see fxquant.report(model)",
            QualityWarning,
            stacklevel=4,
        )
