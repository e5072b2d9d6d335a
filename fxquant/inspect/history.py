"""How passes rewrote one graph of a model, step by step.

A plan is carried out again on the captured graph, without weights, and a snapshot is taken after every pass. So the
history of a checkpoint needs neither calibration nor float weights. It is the same for a model, for its checkpoint, and
for its plan with the float model.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from fxquant.capture.known_values import at_most
from fxquant.errors import UnknownNameError, check_type
from fxquant.inspect.snapshots import GraphChange, NodeState, Snapshot, change_between, order_of, snapshot
from fxquant.inspect.sources import Graphs, Source, graphs_of
from fxquant.ir.edits import Span, TensorEdit
from fxquant.ir.names import count_ops
from fxquant.ir.stages import Stage, later
from fxquant.ir.tensors import read_tensors, set_tensor
from fxquant.pipeline.pipeline import Pass, PassRecord
from fxquant.pipeline.recipes import Recipe, recipe_of
from fxquant.planning.context import PassContext
from fxquant.runtime.replay import refuse_unknown_layers, rewrite_graph
from fxquant.text import fitted, json_values, nearest

FORMAT = 1
"""Version of what :meth:`History.to_json` returns. It grows if an entry changes its meaning or goes away."""


@dataclass(frozen=True)
class TensorChange:
    """What one step did to one tensor.

    Attributes:
        tensor: Name of the tensor.
        what: ``made``, ``copied``, ``folded``, ``replaced`` or ``dropped``; see :class:`fxquant.ir.edits.TensorEdit`.
        source: For a copy: name of the original.
        along: What the factor has one number for: ``rows``, ``columns`` or ``affine``; None if there is no factor.
        factor: Smallest and largest number that the tensor was multiplied by; None if it was not, and if that is not
            known without weights.
        shift: The same for what was added to it.
        layers: The layers that the tensor belongs to; the path of its module if it belongs to none, such as a norm's.
    """

    tensor: str
    what: str
    source: str | None
    along: str | None
    factor: Span | None
    shift: Span | None
    layers: tuple[str, ...]

    @property
    def changes_numbers(self) -> bool:
        """Whether the tensor is another one than before; one that is dropped has only lost its reader."""
        return self.what in ("copied", "folded", "replaced")

    @property
    def done(self) -> str:
        """What was done, without the name of the tensor, such as ``folded times 0.5..2 along its rows``."""
        text = self.what
        if self.source:
            text += f" from {self.source}"
        for word, span in (("times", self.factor), ("plus", self.shift)):
            if span is not None and span not in ((1.0, 1.0), (0.0, 0.0)):
                low, high = (f"{end:.3g}" for end in span)
                text += f" {word} {low}" + (f"..{high}" if high != low else "")
        return text + (f" along its {self.along}" if self.along in ("rows", "columns") else "")

    def __str__(self) -> str:
        return f"{self.tensor}: {self.done}"


@dataclass(frozen=True)
class Step:
    """The graph after one pass, and what the pass changed.

    Attributes:
        name: ``captured``, the name of the pass, or ``lower``.
        text: The pass with its options; the name of the backend; the call that was captured.
        phase: ``capture``, ``prepare`` (before calibration), ``convert`` (after it) or ``lower``.
        stage: Stage of the graph after the step: ``captured``, ``transformed``, ``quantized`` or ``lowered``.
        seconds: Wall time of the pass when the model was quantized, which includes decisions from statistics; None if
            the plan does not say.
        replay_seconds: Wall time of the step in this replay.
        edits: Number of edits of the rewriter.
        edits_by_kind: The same by kind: ``made``, ``erased`` and ``rewired`` nodes, ``folded``, ``replaced`` and
            ``dropped`` tensors.
        ops: Change in the number of nodes by op.
        nodes: The nodes after the step, in order. Nodes that did not change are the same objects as in the step before.
        change: What differs from the step before, by the names of nodes.
        tensors: What the step did to tensors, in order.
    """

    name: str
    text: str
    phase: str
    stage: str
    seconds: float | None
    replay_seconds: float
    edits: int
    edits_by_kind: Mapping[str, int]
    ops: Mapping[str, int]
    nodes: Snapshot
    change: GraphChange
    tensors: tuple[TensorChange, ...] = ()

    def node(self, name: str) -> NodeState | None:
        """The node of a name after this step, or None."""
        return next((state for state in self.nodes if state.name == name), None)


@dataclass(frozen=True)
class History:
    """All steps from the captured graph to the lowered one.

    Attributes:
        model_class: Class of the original model.
        recipe: The recipe as pipeline text.
        backend: Name of the backend.
        graph: Number of the graph among the graphs that calibration captured.
        graphs: How many graphs calibration captured.
        call: The call that the graph serves, as text.
        steps: The steps: captured, one per pass, and lower.
    """

    model_class: str
    recipe: str
    backend: str
    graph: int
    graphs: int
    call: str
    steps: tuple[Step, ...]

    def step(self, name: str) -> Step:
        """The step of a name, or of a pass's whole text; the last one if a pass runs several times.

        Raises:
            UnknownNameError: If there is no such step. The message names the steps.
        """
        for step in reversed(self.steps):
            if name in (step.name, step.text):
                return step
        raise UnknownNameError("step", name, nearest(name, [step.name for step in self.steps]))

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """The steps as text: stage, time, edits, nodes added, removed and rewired, tensors changed, change in ops."""
        head = [
            ("model", f"{self.model_class.rpartition(':')[2]} on {self.backend}"),
            ("graph", f"{self.graph} of {self.graphs}, for calls {self.call}"),
            ("nodes", f"{len(self.steps[0].nodes)} captured, {len(self.steps[-1].nodes)} at the end"),
        ]
        rows = [
            [
                step.text if step.phase != "lower" else f"lower to {step.text}",
                step.phase,
                step.stage,
                "" if step.seconds is None else f"{step.seconds:.2f}",
                step.edits or "",
                f"+{len(step.change.added)} -{len(step.change.removed)} ~{len(step.change.rewired)}",
                sum(change.what != "made" for change in step.tensors) or "",
                " ".join(f"{op.removeprefix('aten::')}:{count:+d}" for op, count in step.ops.items()),
            ]
            for step in self.steps[1:]
        ]
        header = ["pass", "phase", "stage", "seconds", "edits", "nodes", "tensors", "change in ops"]
        table = fitted(header, rows, {0: 44, 7: 44}, right=(3, 4, 6))
        return "\n".join(f"{title:<6} {text}" for title, text in head) + f"\n\n{table}"

    def to_json(self) -> dict[str, Any]:
        """The history as JSON values.

        ``nodes`` lists every different state of a node once; the entry ``order`` of a step has the places in this list
        of the nodes after the step. The other entries are the attributes of :class:`History`, :class:`Step`,
        :class:`~fxquant.inspect.snapshots.NodeState` and so on, by their names. Entries of nodes that are empty are
        left out, and numbers that are not finite are text.
        """
        states, orders = order_of([step.nodes for step in self.steps])
        steps = [_step_json(step, order) for step, order in zip(self.steps, orders, strict=True)]
        own = {name: getattr(self, name) for name in ("model_class", "recipe", "backend", "graph", "graphs", "call")}
        values = json_values({"format": FORMAT, **own, "nodes": [state.to_json() for state in states], "steps": steps})
        assert isinstance(values, dict)
        return values


def _step_json(step: Step, order: list[int]) -> dict[str, Any]:
    plain = {name: value for name, value in vars(step).items() if name not in ("nodes", "change", "tensors")}
    tensors = [{key: value for key, value in asdict(one).items() if value is not None} for one in step.tensors]
    return {**plain, **asdict(step.change), "tensors": tensors, "order": order}


def rewrite_history(
    source: Source, *, model: nn.Module | type[nn.Module] | None = None, graph: int = 0, lower: bool = True
) -> History:
    """Replay how one graph of a quantized model was made, with a snapshot after each pass. No weights are read.

    What is folded into weights comes from the plan, so factors have their ranges. A number that is computed from
    weights, such as the shift of a bias by a product with a weight, has none.

    Args:
        source: What ``fxquant.compile`` or ``fxquant.load`` returned, the folder of a checkpoint or of a pipeline with
            one, or a plan.
        model: For a plan: the float model that it was made for. For a checkpoint of a model that is not from diffusers:
            its class, or an instance.
        graph: Number of the graph, among the graphs that calibration captured.
        lower: Whether to add the step of the backend.

    Raises:
        ConfigurationError: If the source is none of these, or there is no such graph.
        CheckpointError: If the folder holds no checkpoint, or a damaged one.
        CalibrationError: If the model runs layers that the plan does not know.
    """
    check_type("graph", graph, int, "the number of a graph")
    (found,) = rewrite_histories(graphs_of(source, model), [graph], lower=lower)
    return found


def rewrite_histories(given: Graphs, numbers: Sequence[int], *, lower: bool = True) -> list[History]:
    """The histories of several graphs of a model, by one replay; see :func:`rewrite_history`.

    Args:
        given: The model.
        numbers: Numbers of the graphs, at least one.
        lower: Whether to add the step of the backend.
    """
    calls = {number: given.call(number) for number in numbers}
    plan = copy.deepcopy(given.plan)
    recipe = recipe_of(plan)
    context = PassContext(plan)
    watched: dict[int, tuple[_Snapshots, fx.GraphModule]] = {}
    for number in range(max(calls) + 1):  # Earlier graphs decide about the tensors that the graphs share.
        with at_most(len(plan.layers)):
            captured = given.architecture.capture_spec(given.call(number), given.device)
        refuse_unknown_layers(captured, plan)
        watch = _Snapshots(recipe, given.plan.passes)
        if number in calls:
            watched[number] = watch, captured.module
            watch.start(captured.module, str(calls[number]))
        rewrite_graph(captured, context, [*recipe.prepare, *recipe.convert], [watch] if number in calls else [])
    if lower:
        for number, (watch, module) in watched.items():
            watch.lowered(module, given, number)
    return [
        History(
            model_class=plan.model_class,
            recipe=plan.recipe,
            backend=plan.backend,
            graph=number,
            graphs=len(plan.calls),
            call=str(call),
            steps=tuple(watched[number][0].steps),
        )
        for number, call in calls.items()
    ]


class _Snapshots:
    """Instrument that takes a snapshot after each pass."""

    def __init__(self, recipe: Recipe, log: Sequence[Mapping[str, Any]]) -> None:
        self.steps: list[Step] = []
        self._phases = iter(["prepare"] * len(recipe.prepare) + ["convert"] * len(recipe.convert))
        self._log = log
        self._stage = Stage.CAPTURED

    def start(self, module: fx.GraphModule, call: str) -> None:
        """Take the snapshot of the captured graph."""
        nodes = snapshot(module)
        self.steps.append(
            Step("captured", call, "capture", str(self._stage), None, 0.0, 0, {}, {}, nodes, GraphChange())
        )

    def before(self, step: Pass, module: fx.GraphModule) -> None:
        """Nothing to do."""

    def after(self, step: Pass, module: fx.GraphModule, record: PassRecord) -> None:
        """Take a snapshot."""
        self._stage = later(self._stage, step.establishes)
        seconds = next((float(entry["seconds"]) for entry in self._log if entry["pass"] == record.text), None)
        self._add(
            module,
            record.log.tensors,
            name=step.name,
            text=record.text,
            phase=next(self._phases, "convert"),
            stage=str(self._stage),
            seconds=seconds,
            replay_seconds=record.seconds,
            edits=record.edits,
            edits_by_kind=record.log.counts(),
            ops=dict(record.ops),
        )

    def failed(self, step: Pass, module: fx.GraphModule, error: Exception) -> None:
        """Nothing to do: the error says what failed."""

    def lowered(self, module: fx.GraphModule, given: Graphs, graph: int) -> None:
        """Add the step of the backend: the model's own lowered graph, or the graph lowered with stand-in weights."""
        before, began = count_ops(module.graph), time.perf_counter()
        if given.lowered:
            module = given.lowered[graph]
        elif given.backend is None:
            return
        else:
            _fill(module)
            given.backend.finish(module, given.plan, {})
        after = count_ops(module.graph)
        self._add(
            module,
            (),
            name="lower",
            text=given.plan.backend,
            phase="lower",
            stage=str(Stage.LOWERED),
            seconds=None,
            replay_seconds=time.perf_counter() - began,
            edits=0,
            edits_by_kind={},
            ops={op: after[op] - before[op] for op in sorted({*before, *after}) if after[op] != before[op]},
        )

    def _add(self, module: fx.GraphModule, changed: Sequence[TensorEdit], **facts: Any) -> None:
        last = self.steps[-1].nodes
        known = {state.name: state for state in last}
        nodes = snapshot(module, known)
        owners = {state.target: state for state in (*last, *nodes) if state.kind == "tensor"}
        tensors = tuple(_tensor_change(edit, owners) for edit in changed)
        self.steps.append(Step(**facts, nodes=nodes, change=change_between(last, nodes), tensors=tensors))


def _tensor_change(edit: TensorEdit, owners: Mapping[str, NodeState]) -> TensorChange:
    state = owners.get(edit.tensor)
    layers = () if state is None else tuple(state.roles) or ((state.module,) if state.module else ())
    return TensorChange(edit.tensor, edit.what, edit.source, edit.along, edit.factor, edit.shift, layers)


def _fill(module: fx.GraphModule) -> None:
    """Give a graph without weights ones in their place. Which ops a backend chooses does not depend on their values."""
    for name, tensor in read_tensors(module).items():
        if isinstance(tensor, FakeTensor):
            shape = [int(size) for size in tensor.shape]  # torch may hold a size that it knows as a symbolic one.
            set_tensor(module, name, torch.ones(shape, dtype=tensor.dtype, device=tensor.device))
