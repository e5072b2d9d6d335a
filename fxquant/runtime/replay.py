"""Make quantized graphs from a plan: after calibration, on a float model, for a further call, or without weights.

The graphs of a model that is built without weights get their tensors here, and are then lowered to the backend.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fxquant.adapters.branches import Branching
from fxquant.calibration.calibrate import Calibration
from fxquant.calibration.recorded import kept_inputs
from fxquant.capture.calls import Call, CallSpec
from fxquant.capture.fidelity import Original, example
from fxquant.capture.graph import CapturedGraph
from fxquant.capture.known_values import at_most
from fxquant.capture.rebuilding import warn_if_not_rebuilt
from fxquant.capture.trace import Architecture
from fxquant.disk.finished_work import FinishedWork
from fxquant.errors import CalibrationError, CaptureError, CheckpointError, ConfigurationError
from fxquant.ir.attention import find_attentions
from fxquant.ir.digest import graph_digest
from fxquant.ir.layer_changes import take_changes
from fxquant.ir.meta import LAYER
from fxquant.ir.stages import Stage
from fxquant.ir.tensors import bind, is_constant_name, read_tensors, weights_of
from fxquant.pipeline.backend import Backend
from fxquant.pipeline.pipeline import PASSES, Instrument, Pass, PassRecord, Pipeline, WatchesLowering
from fxquant.pipeline.recipes import Recipe, recipe_of
from fxquant.planning.context import PassContext
from fxquant.planning.plan import Plan, tensor_bytes
from fxquant.planning.uses import adopt_names, settle
from fxquant.registry import OWN
from fxquant.runtime.float_model import device_of, dtype_of
from fxquant.runtime.model import GraphModel
from fxquant.statistics.collection import Statistics

if TYPE_CHECKING:
    from fxquant.distributed.team import Team


def convert(
    calibration: Calibration,
    recipe: Recipe,
    backend: Backend,
    dtype: torch.dtype,
    instruments: Sequence[Instrument],
    workspace: FinishedWork | None,
    team: Team | None = None,
) -> GraphModel:
    """Make a quantized model of the graphs that were calibrated.

    Args:
        calibration: The finished calibration of the float model.
        recipe: Its ``convert`` passes run on every graph.
        backend: What the graphs are lowered to.
        dtype: Dtype of the float model.
        instruments: They watch the passes.
        workspace: Where slow passes keep finished results, or None.
        team: The processes that share the work, or None.
    """
    plan = calibration.plan
    quantized = GraphModel(calibration.architecture, dtype, plan, further_graph(recipe, backend), backend)
    context = PassContext(
        plan, calibration.statistics, workspace=workspace, shared=quantized.shared, backend=backend.limits(), team=team
    )
    calibration.forget_observed()
    for number, captured in enumerate(calibration.prepared):
        context.inputs = calibration.inputs_of(number)
        context.forget_inputs()
        records = rewrite_graph(captured, context, recipe.convert, instruments, calibration.prepare.prove)
        backend.finish(captured.module, plan, quantized.tensors())
        _tell_lowered(backend, captured, instruments)
        plan.passes = plan.passes or [log_entry(record) for record in (*calibration.records, *records)]
        quantized.add(captured)
    return quantized


def replay(
    model: nn.Module,
    plan: Plan,
    backend: Backend,
    instruments: Sequence[Instrument],
    statistics: Statistics | None,
    workspace: FinishedWork | None = None,
) -> GraphModel:
    """Apply a recorded plan to a float model; ``workspace`` keeps finished results of slow passes."""
    if not plan.calls:
        raise ConfigurationError(
            "the plan records no call of the model: no calibration made it. Give the plan of a compiled model"
        )
    recipe = recipe_of(plan)
    plan.check()
    plan.checked_json()
    backend.check(plan)
    plan.backend = backend.name
    plan.attribution = None  # Of the model that the plan was made for, which may have had other bits.
    for layer in plan.layers.values():
        layer.weight_sqnr_db = None  # Measured again, because the bits may have been edited.
    weights = weights_of(model)
    warn_if_not_rebuilt(model, plan.timestep)
    architecture = Architecture.of(model, plan.timestep)
    quantized = GraphModel(architecture, dtype_of(model), plan, further_graph(recipe, backend), backend)
    context = PassContext(plan, statistics, workspace=workspace, shared=quantized.shared, backend=backend.limits())
    device, original = device_of(model), Original(model, plan.timestep)
    for call in plan.calls:
        original.warm(example(call, device), architecture)
        captured = architecture.capture_spec(call, device)
        bind(captured.module, weights)
        try:
            refuse_unknown_layers(captured, plan)
        except CalibrationError as error:
            raise ConfigurationError(
                f"the plan was made for another model, {plan.model_class}, or for calls that run less of it: "
                f"{error.reason}"
            ) from error
        context.inputs = kept_inputs(captured, statistics, recipe.convert, device)
        records = convert_graph(captured, context, recipe, backend, quantized.tensors(), instruments)
        plan.passes = plan.passes or [log_entry(record) for record in records]
        quantized.add(captured)
    plan.bytes_before = tensor_bytes(weights)
    plan.bytes_after = tensor_bytes(quantized.tensors())
    return quantized


def convert_graph(
    captured: CapturedGraph,
    context: PassContext,
    recipe: Recipe,
    backend: Backend,
    others: Mapping[str, Tensor],
    instruments: Sequence[Instrument] = (),
    branching: Branching | None = None,
    stored: Mapping[str, Tensor] | None = None,
) -> list[PassRecord]:
    """Prepare, convert and lower one captured graph, as the plan says.

    The graph needs no real weights if other graphs hold them, or ``stored`` has those of the quantized graph. Branches
    are inserted before it is lowered.
    """
    records = Pipeline(recipe.prepare, instruments).run(captured.module, context)
    moved = context.transforms.copy() if branching is not None else {}
    context.forget_inputs()  # Calibration saw what layers read after these passes.
    records += rewrite_graph(
        captured, context, recipe.convert, instruments, stage=Pipeline(recipe.prepare).stage, keep_changes=True
    )
    changes = take_changes(captured.module)
    if branching is not None:
        branching.insert(captured.module, changes, {*moved, *context.transforms}, context.plan)
    if stored is not None:
        bind(captured.module, stored)
    backend.finish(captured.module, context.plan, others)
    _tell_lowered(backend, captured, instruments)
    return records


def _tell_lowered(backend: Backend, captured: CapturedGraph, instruments: Sequence[Instrument]) -> None:
    for instrument in instruments:
        if isinstance(instrument, WatchesLowering):
            instrument.lowered(backend.name, captured.module)


def refuse_unknown_layers(captured: CapturedGraph, plan: Plan) -> None:
    """Raise if the plan lacks a layer of a graph or, if the plan quantizes attentions, one of its attentions.

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


def further_graph(recipe: Recipe, backend: Backend) -> Callable[..., CapturedGraph]:
    """Return the function that makes a graph for a call that fits none: trace, replay the plan, share the tensors."""

    def make_graph(owner: GraphModel, call: Call | CallSpec, branching: Branching | None = None) -> CapturedGraph:
        assert owner.plan is not None
        if isinstance(call, CallSpec):
            captured = owner.architecture.capture_spec(call, owner.runs_on)
        else:
            captured = owner.architecture.capture(call, [graph.call for graph in owner.captured])
        plan = copy.deepcopy(owner.plan)  # Decisions for a further call must not change the plan of calibration.
        settle(captured.module.graph, plan)
        try:
            refuse_unknown_layers(captured, plan)
        except CalibrationError as error:
            raise CalibrationError(
                f"{error.reason}: this call of the model runs more than any calibration call did. Calibrate with calls "
                f"like it: {captured.call}"
            ) from error
        again = None if branching is None else captured.copy()
        tensors, limits = owner.tensors(), backend.limits()
        context = PassContext(plan, shared=owner.shared.without_weights(), backend=limits)
        convert_graph(captured, context, recipe, backend, tensors, branching=branching)
        try:
            return bound_graph(captured, tensors)
        except CaptureError:
            if again is None:
                raise
        # Beside a branch, the backend runs a layer by another kernel, for which no graph holds the weight.
        context = PassContext(plan, shared=owner.shared.without_weights(), backend=limits)
        stored = owner.stored_tensors()
        convert_graph(again, context, recipe, backend, tensors, branching=branching, stored=stored)
        return bound_graph(again, tensors)

    return make_graph


def rewrite_graph(
    captured: CapturedGraph,
    context: PassContext,
    passes: Sequence[Pass],
    instruments: Sequence[Instrument] = (),
    prove: bool = False,
    stage: Stage = Stage.CAPTURED,
    keep_changes: bool = False,
) -> list[PassRecord]:
    """Run passes on a captured graph, and record what the graph is before a backend lowers it."""
    records = Pipeline(passes, instruments, prove=prove).run(captured.module, context, stage)
    if not keep_changes:
        take_changes(captured.module)
    context.shared.settle_names(captured.module)
    captured.digest = graph_digest(captured.module.graph, layouts=False)
    return records


def model_from_plan(
    architecture: Architecture, plan: Plan, backend: Backend, dtype: torch.dtype, device: torch.device
) -> GraphModel:
    """Build a quantized model from a plan alone, without float weights.

    :func:`bind_all` gives the model its tensors; then :func:`lower_all` lowers it to the backend.

    Raises:
        CheckpointError: If the plan records no call, or the architecture has layers that the plan does not contain.
    """
    if not plan.calls:
        raise CheckpointError("the plan records no call of the model")
    recipe = recipe_of(plan)
    quantized = GraphModel(architecture, dtype, plan, further_graph(recipe, backend), backend)
    context = PassContext(plan, shared=quantized.shared, backend=backend.limits())
    for call in plan.calls:
        with at_most(len(plan.layers)):
            captured = architecture.capture_spec(call, device)
        try:
            refuse_unknown_layers(captured, plan)
        except CalibrationError as error:
            raise CheckpointError(
                f"the model that is built for it runs more than was quantized: {error.reason}. The plan belongs to "
                "another model, or to another version of its class"
            ) from error
        rewrite_graph(captured, context, [*recipe.prepare, *recipe.convert])
        quantized.add(captured)
    return quantized


def lowered_for(quantized: GraphModel, device: torch.device) -> GraphModel:
    """The same model, lowered for a device. Its graphs are made from the plan, and its tensors from the stored codes.

    Raises:
        BackendError: If the backend does not run on the device, or not these layers.
        ConfigurationError: If the plan was edited since the model was made.
    """
    assert quantized.plan is not None and quantized.backend is not None
    quantized.backend.check_device(device)
    backend = quantized.backend.on(device)
    backend.check(quantized.plan)
    made = model_from_plan(quantized.architecture, quantized.plan, backend, quantized.dtype, device)
    if [graph.digest for graph in made.captured] != [graph.digest for graph in quantized.lasting]:
        raise ConfigurationError(
            f"the plan of this model was edited, so it cannot be lowered for {device.type}. Edit a copy of the plan, "
            "and compile the float model with plan="
        )
    bind_all(made, {name: tensor.to(device) for name, tensor in quantized.stored_tensors().items()})
    lower_all(made)
    return made


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
                continue  # A cache of the given model holds it; the model that wrote the file computed it.
            if name not in tensors:
                raise CheckpointError(f"no tensor {name!r}: the weights do not belong to this model or are incomplete")
            if tensors[name].dtype != held.dtype:
                raise CheckpointError(f"tensor {name!r} is {tensors[name].dtype}, but the model needs {held.dtype}")
        bind(captured.module, tensors)
    extra = sorted(name for name in tensors.keys() - read if not is_constant_name(name))
    if extra:
        raise CheckpointError(f"the model reads no tensor {extra[0]!r}: the weights belong to another model")


def log_entry(record: PassRecord) -> dict[str, Any]:
    """What the plan records about a pass that ran."""
    entry = {"pass": record.text, "seconds": round(record.seconds, 3), "edits": record.edits, "ops": record.ops}
    module = PASSES.module_of(record.text.partition("{")[0])
    return {**entry, "changes": record.log.counts()} | ({} if module.startswith(OWN) else {"module": module})


def bound_graph(captured: CapturedGraph, tensors: Mapping[str, torch.Tensor]) -> CapturedGraph:
    """Bind tensors to a graph that was captured for a call after the float model was gone.

    Raises:
        CaptureError: If the graph reads a tensor that no captured graph read.
    """
    try:
        bind(captured.module, tensors)
    except CheckpointError as error:
        read = read_tensors(captured.module)
        unread = (name for name in sorted(read.keys() - tensors.keys()) if isinstance(read[name], FakeTensor))
        what = next((f"it reads {name!r}, which no calibration call read" for name in unread), str(error))
        raise CaptureError(
            f"a call {captured.call} runs a part of the model that no calibration call ran: {what}; calibrate with a "
            "call like this one as well"
        ) from error
    return captured
