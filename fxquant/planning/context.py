"""What passes are given while they run: the plan, and the data from which they decide what the plan lacks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fxquant.disk.finished_work import FinishedWork
from fxquant.errors import CalibrationError, PassError
from fxquant.ir.shared import SharedTensors
from fxquant.numerics.weights import QuantizedWeight
from fxquant.planning.decisions import LayerPlan
from fxquant.planning.input_transforms import InputTransform, Rows
from fxquant.planning.plan import Plan
from fxquant.statistics.channels import ChannelStatistics
from fxquant.statistics.collection import Statistics

if TYPE_CHECKING:
    from fxquant.distributed.team import Team


@dataclass(frozen=True)
class BackendLimits:
    """What the backend of a model runs, with its options and on the device of the model.

    Attributes:
        name: Name of the backend.
        formats: Names of the number formats whose products it runs; None for all.
        refuse: Says why it cannot run a layer as planned, and what works instead; None if it can.
    """

    name: str
    formats: frozenset[str] | None
    refuse: Callable[[LayerPlan], str | None]


@dataclass(eq=False)
class PassContext:
    """The plan of a model and what exists only while graphs of the model are rewritten. Nothing but the plan is saved.

    All graphs of a model are rewritten with the same ``codes`` and ``shared``. The memo is new for each pass.

    Attributes:
        plan: Decisions. A pass carries out those that it finds here, and adds those that are missing.
        statistics: What calibration recorded; None if a plan is carried out without them.
        inputs: Tensor inputs of calibration calls of the graph, for passes that run the graph again. One list per call,
            one tensor per graph input. Empty if no pass asked for them (:meth:`Pass.wants_samples`).
        workspace: Keeps finished results of slow passes in the folder of ``resume=``; None without such a folder.
        codes: Weights that are rounded already, by layer. ``quantize-linears`` takes them from here.
        shared: What the graphs of the model decided about the tensors that they share.
        memo: Decisions that a pass may use again within one graph, by keys that the pass chooses.
        transforms: How passes changed the inputs of layers since calibration, by layer (:meth:`transform_input`).
        changed: Layers whose input a pass changed without saying how, each with that pass.
        timestep_weights: How much each timestep counts in the second moments of a layer's input, by layer and timestep;
            layers that are not listed count all rows alike.
        backend: What the backend runs for which the model is converted; None if the passes run without one.
        team: The processes that convert the model together, each the same graphs with the same statistics; None if one
            process works alone.
        progress: Called as ``progress(what, done, total)`` by passes that take long; None if progress is not shown.
    """

    plan: Plan
    statistics: Statistics | None = None
    inputs: list[list[Tensor]] = field(default_factory=list)
    workspace: FinishedWork | None = None
    codes: dict[str, QuantizedWeight] = field(default_factory=dict)
    shared: SharedTensors = field(default_factory=SharedTensors)
    memo: dict[Any, Any] = field(default_factory=dict)
    transforms: dict[str, list[InputTransform]] = field(default_factory=dict)
    changed: dict[str, str] = field(default_factory=dict)
    timestep_weights: dict[str, dict[float, float]] = field(default_factory=dict)
    backend: BackendLimits | None = None
    progress: Callable[[str, int, int], object] | None = None
    team: Team | None = None

    def transform_input(self, layer: str, function: Rows) -> None:
        """Declare how a pass changes the input of a layer, other than by channel factors and shifts in the plan.

        What later passes read of the layer's calibration statistics is then transformed in the same way: rows, ranges
        (of the sampled rows) and second moments. Call it in every run of the pass, also if it carries out a decision
        that the plan holds already. The pipeline compares the function with what the graph computes.

        ::

            matrix = context.plan.decisions_of(Rotation)[name].matrix
            context.transform_input(name, lambda rows: rows @ matrix.double())

        Args:
            layer: Name of the layer.
            function: Maps rows of the input ``[n, C]``, float64, to rows ``[n, C']``, each row by itself.
        """
        after = {"factor": layer, "shift": f"{layer}.shift"}
        known = frozenset(kind for kind, key in after.items() if key in self.plan.vectors)
        self.transforms.setdefault(layer, []).append(InputTransform(function, known))

    def forget_inputs(self) -> None:
        """Forget how passes changed the inputs of layers, because a graph begins in which no pass has."""
        self.transforms.clear()
        self.changed.clear()

    def for_trial(self) -> PassContext:
        """A context with copies of the plan and of all that a pass changes, to run a pass without consequences."""
        transforms = {name: list(found) for name, found in self.transforms.items()}
        plan, shared = copy.deepcopy(self.plan), copy.deepcopy(self.shared)
        changed = dict(self.changed)
        return replace(
            self, plan=plan, shared=shared, transforms=transforms, changed=changed, memo={}, codes=dict(self.codes),
            timestep_weights=dict(self.timestep_weights),
        )  # fmt: skip

    def take_back(self, earlier: PassContext) -> None:
        """Undo what a pass that failed changed: ``earlier`` is what :meth:`for_trial` gave before the pass."""
        vars(self.plan).update(vars(earlier.plan))
        kept = [(vars(self.shared)[name], before) for name, before in vars(earlier.shared).items()]
        kept += [
            (getattr(self, name), getattr(earlier, name))
            for name in ("codes", "transforms", "changed", "timestep_weights")
        ]
        for held, before in kept:
            if isinstance(held, (dict, set)):  # Other contexts may hold the same dict.
                held.clear()
                held.update(before)

    def refuse_changed(self, layer: str) -> None:
        """Refuse to hand out statistics of an input that a pass changed without saying how.

        Raises:
            PassError: Names the layer and the pass, and says what to do.
        """
        if layer in self.changed:
            raise PassError(
                f"layer {layer!r} no longer reads what calibration saw: the pass {self.changed[layer]} changed its "
                "input and did not declare how. Call context.transform_input(layer, function) in that pass; or let the "
                "pass run before calibration, left of the semicolon of the recipe"
            )

    def observed(self, key: str, why: str | None = None) -> ChannelStatistics:
        """Calibration statistics of one value.

        Args:
            key: Name of the value.
            why: What the statistics are needed for, for the message.

        Raises:
            CalibrationError: If there are no statistics, because no calibration ran or it never reached the layer.
        """
        if self.statistics is None:
            raise CalibrationError(
                f"{why or f'layer {key!r} needs an activation range'}, but there are no calibration statistics; "
                "pass calibrate= to fxquant.compile, or pass plan= with the statistics= that calibration recorded",
                reason=f"the plan does not hold what was decided: {why or f'layer {key!r} needs an activation range'}",
            )
        return self.statistics[key]
