"""What users call: trace a model, compile it to a quantized one."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

from fxquant.calibration.calibrate import Calibration, output_sqnr, refuse_redirected, run_calibration
from fxquant.capture.fidelity import Original, example
from fxquant.capture.graph import CapturedGraph
from fxquant.capture.hooks import refuse_hooks
from fxquant.capture.known_values import at_most
from fxquant.capture.rebuilding import is_rebuilt, obstacle
from fxquant.capture.threads import without_autocast
from fxquant.capture.trace import Architecture
from fxquant.errors import (
    AlreadyCompiledError,
    CalibrationError,
    CheckpointError,
    ConfigurationError,
    NonFiniteError,
    PortabilityWarning,
    QualityWarning,
)
from fxquant.ir.attention import find_attentions
from fxquant.ir.digest import graph_digest
from fxquant.ir.meta import LAYER
from fxquant.ir.shared import SharedTensors
from fxquant.ir.tensors import bind, is_constant_name, read_tensors, weights_and_buffers, weights_of
from fxquant.numerics.finite import require_finite
from fxquant.pipeline.backend import Backend, resolve_backend
from fxquant.pipeline.pipeline import Instrument, PassRecord, Pipeline
from fxquant.pipeline.recipes import Recipe, make_recipe
from fxquant.planning.plan import Plan, tensor_bytes
from fxquant.planning.uses import adopt_names, settle
from fxquant.runtime.model import GraphModel, bound_graph
from fxquant.schemas.common import check
from fxquant.schemas.plan import PlanFile
from fxquant.statistics.observers import Statistics
from fxquant.storage.aot.package import PackagedModel

_POOR_DB = 10.0


def trace(model: nn.Module, *, timestep: str | None = "timestep") -> GraphModel:
    """Wrap a diffusion transformer as FX graphs, without changing its function.

    Graphs are captured from the calls as they come; images made with the result equal the model's bit for bit. Each is
    compared with the model on other inputs, which costs a call of either. What is decorated with ``torch.compile``
    counts as it runs without.

    Args:
        model: A diffusion transformer in evaluation mode. Its weights are shared, not copied.
        timestep: Name of the ``forward`` argument that holds the timestep, or None.

    Raises:
        AlreadyCompiledError: If the model is an fxquant model already.
        ConfigurationError: If it is no model, or a module in it is in training mode, went through ``torch.compile``, or
            has hooks that a graph cannot have (offloading, casting, caches of steps).
    """
    check_model(model)
    architecture = Architecture.of(model, timestep)
    original = Original(model, timestep)
    # Not detached: on inputs that do not lie in order, torch multiplies in another order by weights that require
    # gradients, and the last bits differ.
    weights = dict(weights_and_buffers(model))

    def make_graph(owner: GraphModel, names: tuple[str, ...], leaves: Sequence[Any], structure: Any) -> CapturedGraph:
        original.warm(leaves, structure)
        captured = architecture.capture(names, leaves, structure, [graph.call for graph in owner.captured])
        bind(captured.module, {**owner.weights, **owner.tensors()})
        for leaf in leaves:
            if isinstance(leaf, Tensor):  # The weights themselves stay where they were when the model was traced.
                captured.module.to(leaf.device)
                break
        original.compare(captured, leaves, structure)
        return captured

    return GraphModel(architecture, dtype_of(model), None, make_graph, weights=weights)


def compile(
    model: nn.Module,
    *,
    recipe: str | Recipe | None = None,
    backend: str | Backend = "fake-quant",
    calibrate: Callable[[], Any] | None = None,
    plan: Plan | None = None,
    layers: str = "default",
    timestep: str = "timestep",
    measure: int = 8,
    statistics: Statistics | None = None,
    instruments: Sequence[Instrument] = (),
    resume: str | Path | None = None,
) -> GraphModel:
    """Quantize a diffusion transformer; shaped like ``torch.compile``: a module in, a drop-in module out.

    The graph is captured from the first call that ``calibrate`` makes. While it runs, the model's calls go through a
    graph with observers; when it returns, the model is as it was, and the quantized one shares what stayed float.

    Args:
        model: A diffusion transformer in evaluation mode, such as ``pipe.transformer``.
        recipe: A name with a precision, such as ``"ptq4dit-w4a8"``, or a :class:`~fxquant.pipeline.recipes.Recipe`.
        backend: ``"fake-quant"``, another registered name, or a backend.
        calibrate: Any callable that runs the model the way it will be used.
        plan: In place of recipe and calibration: a plan from an earlier run, edited or not, to carry out again. The
            model gets a copy.
        layers: ``"default"`` (transformer blocks; embedders with float arithmetic and 8-bit weights), ``"blocks"``
            (embedders wholly float) or ``"all"``.
        timestep: Name of the ``forward`` argument that holds the timestep.
        measure: Number of calibration calls on which the output error is measured afterwards; 0 for none.
        statistics: Receives what the observers record, to look at it or to merge runs; a new one if None. With a plan:
            what was recorded when it was made, for weights that are rounded by more than their own values (GPTQ).
        instruments: Watch every pass: timing, dumps, reproducers (:mod:`fxquant.pipeline.pipeline`).
        resume: Folder in which passes that take long (block reconstruction) keep what they have finished. The same call
            with the same folder goes on from there; what was learned from other weights, inputs or options is ignored.

    Returns:
        The quantized model, to put in the pipeline in place of ``model``.

    Raises:
        AlreadyCompiledError: If the model is an fxquant model already.
        ConfigurationError: If options contradict each other or are out of range, a module is in training mode, went
            through ``torch.compile``, or has hooks that a graph cannot have (offloading, casting, caches of steps).
        UnknownNameError: If there is no such recipe or backend.
        CalibrationError: If calibration is missing, fails, or reaches no layer.
        MissingTimestepError: If the model has no input of the name ``timestep``.
        CaptureError: If the model cannot be traced.
        NonFiniteError: If a weight or activation holds NaN or infinity.
        BackendError: If the backend cannot run what the recipe asks for.
    """
    check_model(model)
    _refuse_adapters(model)
    _check_options(recipe, backend, plan, measure, statistics)
    _check_storage(model)
    device = _device_of(model)
    runner = resolve_backend(backend).on(device)
    runner.check_device(device)
    if plan is not None:
        if recipe is not None or calibrate is not None:
            raise ConfigurationError("give either a plan, or a recipe with calibrate")
        _check_weights(model)
        with without_autocast(device.type):
            return _replay(model, copy.deepcopy(plan), runner, instruments, statistics)
    if recipe is None:
        raise ConfigurationError('compile needs a recipe, such as recipe="ptq4dit-w8a8", or a plan')
    chosen = make_recipe(recipe, layers)
    if calibrate is None:
        raise CalibrationError(
            "static activation ranges come from calibration, and the graph from its first call; pass calibrate=, "
            "a function that runs the model, such as lambda: pipe(class_labels=labels, num_inference_steps=25)"
        )
    weights = weights_of(model)
    _check_weights(model)
    _warn_if_not_rebuilt(model, timestep)
    architecture = Architecture.of(model, timestep)
    made = Plan(str(chosen), class_path(model), timestep)
    made.backend = runner.name

    def check() -> None:
        made.check()
        runner.check(made)

    calibration = Calibration(
        model, architecture, made, chosen.prepare, chosen.convert, measure, instruments, statistics, check
    )
    run_calibration(calibration, model, calibrate)
    made.calls = [captured.call for captured in calibration.prepared]
    made.timesteps = calibration.statistics.timesteps.tolist()
    made.statistics = calibration.statistics
    if made.statistics.transient:
        made.statistics.seal()
    made.workspace = None if resume is None else Path(resume)
    made.bytes_before = tensor_bytes(weights)
    try:
        with without_autocast(device.type):
            quantized = _convert(calibration, chosen, runner, dtype_of(model), instruments)
    finally:
        made.statistics = made.inputs = made.workspace = None
        made.codes.clear()
    made.bytes_after = tensor_bytes(quantized.tensors())
    made.output_sqnr_db = output_sqnr(quantized, calibration.chosen_samples())
    _warn_if_poor(made)
    return quantized


def _device_of(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in weights_of(model).values()), torch.device("cpu"))


def _convert(
    calibration: Calibration, recipe: Recipe, backend: Backend, dtype: torch.dtype, instruments: Sequence[Instrument]
) -> GraphModel:
    plan = calibration.plan
    pipeline = Pipeline(recipe.convert, instruments)
    quantized = GraphModel(calibration.architecture, dtype, plan, _further_graph(recipe, backend), backend)
    calibration.forget_observed()
    for number, captured in enumerate(calibration.prepared):
        plan.inputs = calibration.inputs_of(number)
        records = pipeline.run(captured.module, plan)
        plan.shared.settle_names(captured.module)
        captured.digest = graph_digest(captured.module.graph)
        backend.finish(captured.module, plan, quantized.tensors())
        plan.passes = plan.passes or [_log_entry(record) for record in records]
        quantized.add(captured)
    return quantized


def _replay(
    model: nn.Module, plan: Plan, backend: Backend, instruments: Sequence[Instrument], statistics: Statistics | None
) -> GraphModel:
    """Carry out a recorded plan on a float model."""
    if not plan.calls:
        raise ConfigurationError("the plan records no call of the model; it was made by no calibration")
    recipe = Recipe.parse(plan.recipe)
    plan.check()
    try:
        check(PlanFile, plan.to_json(), "the plan")
    except CheckpointError as error:
        raise ConfigurationError(str(error)) from None
    backend.check(plan)
    plan.backend = backend.name
    for layer in plan.layers.values():
        layer.weight_sqnr_db = None  # Measured anew, for the bits may have been edited.
    plan.shared = SharedTensors()
    weights = weights_of(model)
    _warn_if_not_rebuilt(model, plan.timestep)
    architecture = Architecture.of(model, plan.timestep)
    quantized = GraphModel(architecture, dtype_of(model), plan, _further_graph(recipe, backend), backend)
    device, original = _device_of(model), Original(model, plan.timestep)
    for call in plan.calls:
        original.warm(example(call, device), call.structure, architecture)
        captured = architecture.capture_spec(call, device)
        bind(captured.module, weights)
        try:
            refuse_unknown_layers(captured, plan)
        except CalibrationError as error:
            raise ConfigurationError(
                f"the plan was made for another model, {plan.model_class}, or for calls that run less of it: {error}"
            ) from error
        plan.statistics = statistics
        try:
            records = convert_graph(captured, plan, recipe, backend, quantized.tensors(), instruments)
        finally:
            plan.statistics = None
        plan.passes = plan.passes or [_log_entry(record) for record in records]
        quantized.add(captured)
    plan.bytes_before = tensor_bytes(weights)
    plan.bytes_after = tensor_bytes(quantized.tensors())
    return quantized


def convert_graph(
    captured: CapturedGraph,
    plan: Plan,
    recipe: Recipe,
    backend: Backend,
    held: Mapping[str, Tensor],
    instruments: Sequence[Instrument] = (),
) -> list[PassRecord]:
    """Take one captured graph all the way, as the plan says; without real weights if other graphs hold them."""
    records = Pipeline([*recipe.prepare, *recipe.convert], instruments).run(captured.module, plan)
    plan.shared.settle_names(captured.module)
    captured.digest = graph_digest(captured.module.graph)
    backend.finish(captured.module, plan, held)
    return records


def refuse_unknown_layers(captured: CapturedGraph, plan: Plan) -> None:
    """Raise if a graph runs a layer, or one that quantizes attentions an attention, about which the plan says nothing.

    Raises:
        CalibrationError: Names the first such layer or attention.
    """
    adopt_names(captured.module.graph, plan)
    for node in captured.module.graph.nodes:
        if LAYER in node.meta:
            plan.layer(node.meta[LAYER])
    if any(attention.bits is not None for attention in plan.attentions.values()):
        for found in find_attentions(captured.module.graph):
            plan.attention(found.name)


def _further_graph(recipe: Recipe, backend: Backend) -> Callable[..., CapturedGraph]:
    """How a quantized model makes a graph for a call that fits none: trace, replay the plan, share the tensors."""

    def make_graph(owner: GraphModel, names: tuple[str, ...], leaves: Sequence[Any], structure: Any) -> CapturedGraph:
        assert owner.plan is not None
        captured = owner.architecture.capture(names, leaves, structure, [graph.call for graph in owner.captured])
        plan = copy.deepcopy(owner.plan)  # What a further call decides is no part of what calibration decided.
        plan.shared = owner.plan.shared.without_weights()
        settle(captured.module.graph, plan)
        try:
            refuse_unknown_layers(captured, plan)
        except CalibrationError as error:
            raise CalibrationError(
                f"{error}: this call of the model runs more than any calibration call did. Calibrate with calls like "
                f"it: {captured.call}"
            ) from error
        convert_graph(captured, plan, recipe, backend, owner.tensors())
        return bound_graph(captured, owner.tensors())

    return make_graph


def model_from_plan(
    architecture: Architecture, plan: Plan, backend: Backend, dtype: torch.dtype, device: torch.device
) -> GraphModel:
    """Build a quantized model from a plan alone, without float weights.

    :func:`bind_all` gives it its tensors, and then :func:`lower_all` takes it to the backend.

    Raises:
        CheckpointError: If the plan records no call, or the architecture has layers of which the plan says nothing.
    """
    if not plan.calls:
        raise CheckpointError("the plan records no call of the model")
    recipe = Recipe.parse(plan.recipe)
    plan.shared = SharedTensors()
    quantized = GraphModel(architecture, dtype, plan, _further_graph(recipe, backend), backend)
    for call in plan.calls:
        with at_most(len(plan.layers)):
            captured = architecture.capture_spec(call, device)
        try:
            refuse_unknown_layers(captured, plan)
        except CalibrationError as error:
            raise CheckpointError(
                f"the model that is built for it runs more than was quantized: {error}. It belongs to another model, "
                "or to another version of its class"
            ) from error
        Pipeline([*recipe.prepare, *recipe.convert]).run(captured.module, plan)
        plan.shared.settle_names(captured.module)
        captured.digest = graph_digest(captured.module.graph)
        quantized.add(captured)
    return quantized


def lower_all(quantized: GraphModel) -> None:
    """Lower the graphs of a model that has its tensors."""
    assert quantized.plan is not None and quantized.backend is not None
    lowered: dict[str, Tensor] = {}
    for captured in quantized.captured:
        quantized.backend.finish(captured.module, quantized.plan, lowered)
        for name, tensor in read_tensors(captured.module).items():
            lowered.setdefault(name, tensor)


def bind_all(quantized: GraphModel, tensors: Mapping[str, Tensor]) -> None:
    """Give every graph of a model its tensors.

    Raises:
        CheckpointError: If a tensor is missing, has another shape or dtype, or is read by no graph.
    """
    read = set()
    for captured in quantized.captured:
        for name, held in read_tensors(captured.module).items():
            read.add(name)
            if name not in tensors and is_constant_name(name) and not isinstance(held, FakeTensor):
                continue  # In a cache of the model that was given; where the file was written, it was computed.
            if name not in tensors:
                raise CheckpointError(f"no tensor {name!r}: the weights do not belong to this model or are incomplete")
            if tensors[name].dtype != held.dtype:
                raise CheckpointError(f"tensor {name!r} is {tensors[name].dtype}, the model needs {held.dtype}")
        bind(captured.module, tensors)
    extra = sorted(name for name in tensors.keys() - read if not is_constant_name(name))
    if extra:
        raise CheckpointError(f"the model reads no tensor {extra[0]!r}: the weights belong to another model")


def class_path(model: nn.Module) -> str:
    """Where a model's class is found again: ``diffusers:DiTTransformer2DModel``, or its module and name."""
    cls = type(model)
    root = cls.__module__.partition(".")[0]
    return f"{root if root == 'diffusers' else cls.__module__}:{cls.__qualname__}"


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype that a model says it has, for some keep a part in float32; else that of its first tensor."""
    said = getattr(model, "dtype", None)
    if isinstance(said, torch.dtype):
        return said
    tensors = weights_of(model).values()
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)


def check_model(model: Any) -> None:
    """Refuse what is no float model that a graph can be made of.

    Raises:
        AlreadyCompiledError: If fxquant made it.
        ConfigurationError: If it is no module, went through ``torch.compile``, has hooks or is being calibrated.
    """
    if isinstance(model, (GraphModel, PackagedModel)):
        raise AlreadyCompiledError("this model was made by fxquant; give the original float model")
    if not isinstance(model, nn.Module):
        raise ConfigurationError(
            f"a {type(model).__name__} is no model; give the transformer itself, such as pipe.transformer"
        )
    compiled = next((path for path, part in model.named_modules() if "_orig_mod" in part._modules), None)
    if compiled is not None:  # The class that tells is costly to import.
        raise ConfigurationError(
            f"{f'module {compiled!r}' if compiled else 'this model'} went through torch.compile; give fxquant the "
            "original, and what it returns to torch.compile: the other way round fxquant would see no graph"
        )
    refuse_hooks(model)
    refuse_redirected(model)


def _refuse_adapters(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if any(
            base.__name__ == "BaseTunerLayer" and base.__module__.startswith("peft.") for base in type(module).__mro__
        ):
            raise ConfigurationError(
                f"layer {name!r} of the model holds an adapter, such as a LoRA. Captured, it could neither be scaled "
                "nor switched off nor loaded again; make it part of the weights first: pipe.fuse_lora(), then "
                "pipe.unload_lora_weights()"
            )


def _warn_if_not_rebuilt(model: nn.Module, timestep: str | None) -> None:
    """Say before the work that saving will refuse its result, as far as can be told without tracing."""
    reason = obstacle(model, timestep) if is_rebuilt(model) else None
    if reason is not None:
        warnings.warn(
            f"loading would not build this {type(model).__name__} again from its class and config: {reason}. "
            "fxquant.save will refuse the quantized model unless needs_model=True is given",
            PortabilityWarning,
            stacklevel=3,
        )


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
        raise ConfigurationError(f"measure={measure!r} is no number of calls; give 0 for none, or more")
    if not isinstance(statistics, (Statistics, type(None))):
        raise ConfigurationError(f"statistics is a {type(statistics).__name__}; make one with fxquant.Statistics()")


def _check_storage(model: nn.Module) -> None:
    """Refuse weights that are no plain floats: those without values, and those that were quantized before."""
    for name, weight in itertools.chain(model.named_parameters(), model.named_buffers()):
        kind, dtype = type(weight), weight.dtype
        # Wrappers hold other tensors; bitsandbytes and GGUF hold packed bytes in parameters of their own classes.
        packed = kind not in (nn.Parameter, nn.Buffer, Tensor) and not dtype.is_floating_point
        if is_lazy(weight) or weight.is_meta:
            found = "without values" + (", on the meta device" if weight.is_meta else "")
            advice = "load the weights first; if accelerate offloads them, load the model again without that"
        elif packed or kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
            held = type(weight.data) if kind is nn.Parameter else kind
            found = f"a {held.__qualname__} of {held.__module__}"
            advice = "load the float model, neither quantized nor distributed by another library"
        elif weight.is_quantized or (dtype.is_floating_point and dtype.itemsize < 2):
            found = f"stored as {dtype}"
            advice = "load the float model, in bfloat16 or float32, without enable_layerwise_casting"
        else:
            continue
        raise ConfigurationError(
            f"{name!r} of the model is {found}; fxquant starts from floating-point weights of 16, 32 or 64 bits: "
            f"{advice}"
        )


def _check_weights(model: nn.Module) -> None:
    # Parameters only: a buffer may be a mask, whose minus infinity is meant.
    for name, weight in model.named_parameters():
        try:
            require_finite(weight.detach(), f"weight {name!r} of the model")
        except NonFiniteError as error:
            raise NonFiniteError(
                f"{error} Load the model again, in bfloat16 or float32 if a cast to float16 overflowed."
            ) from None


def _log_entry(record: PassRecord) -> dict[str, Any]:
    return {"pass": record.text, "seconds": round(record.seconds, 3), "edits": record.edits, "ops": record.ops}


def _warn_if_poor(plan: Plan) -> None:
    values = list(plan.output_sqnr_db.values())
    if values and sum(values) / len(values) < _POOR_DB:
        warnings.warn(
            f"the quantized model's output has {sum(values) / len(values):.1f} dB SQNR against float; images will "
            "differ visibly. More weight bits, groups (-g64) or another recipe help; see fxquant.report(model)",
            QualityWarning,
            stacklevel=3,
        )
