"""Calibration: while the user's own code runs the model, the model's calls go through the observed graph."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.calibration.attributes import instance_attribute
from fxquant.calibration.journal import Journal
from fxquant.calibration.kept_calls import Spread, calls_wanted, some_samples
from fxquant.calibration.later_moments import LaterMoments
from fxquant.calibration.later_steps import LaterSteps
from fxquant.calibration.refusals import not_called, refuse_autocast, refuse_other_steps
from fxquant.calibration.samples import KEPT_SAMPLES, RUN_SAMPLES, Sample, timestep_of
from fxquant.capture.calls import Call
from fxquant.capture.describe import warn_of_many
from fxquant.capture.fidelity import Original
from fxquant.capture.graph import CapturedGraph
from fxquant.capture.trace import Architecture
from fxquant.errors import CalibrationError, ConfigurationError, FxquantError
from fxquant.ir.digest import digest_of_graph
from fxquant.ir.ops import recording
from fxquant.ir.tensors import bind, copy_graph, weights_of
from fxquant.ir.time_tables import missing_timestep
from fxquant.memory.bound import current
from fxquant.pipeline.conduct import ask, check_repeats
from fxquant.pipeline.pipeline import PASSES, Instrument, Pass, PassRecord, Pipeline
from fxquant.planning.context import PassContext
from fxquant.planning.decisions import LayerPlan
from fxquant.planning.plan import Plan
from fxquant.planning.uses import combine, keys_in
from fxquant.planning.working_sets import require_largest
from fxquant.statistics.collection import Statistics

_COMPARED = 2  # Calls that are kept to run graphs before and after a pass, if no pass asks for any.


class Calibration:
    """Records the data that passes decide from, while calls of the model go through observed graphs.

    Args:
        model: The float model.
        architecture: The same model without weights.
        plan: Receives what the passes decide.
        prepare: Passes on each captured graph before it is observed.
        convert: Passes that will decide from the statistics. They say which statistics are needed.
        keep: Number of calls to keep for measuring the output error; up to twice as many are held meanwhile.
        instruments: Watch these passes.
        statistics: Receives what the observers record.
        check: Called when bit widths are decided, before anything is observed; raises errors that would otherwise come
            only at the end.
        prove: Whether passes are proved, for which calls are kept (:mod:`fxquant.pipeline.proving`).

    Attributes:
        prepared: The captured graphs, after the passes that come before calibration; one per kind of call.
        records: What these passes did to the first of these graphs.
        statistics: What the observers recorded.
        most_samples: Number of calls on which the output error is measured.
        calls: Number of calls of the model so far.
        steps: The timesteps seen so far, in order. Recorded only if a single denoising step is observed.
        failure: The first error of a call, which the user's code may have swallowed.
        journal: Keeps what calls compute, so that an interrupted calibration continues; None to keep nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        architecture: Architecture,
        plan: Plan,
        prepare: Sequence[Pass],
        convert: Sequence[Pass],
        keep: int,
        instruments: Sequence[Instrument] = (),
        statistics: Statistics | None = None,
        check: Callable[[], None] = lambda: None,
        prove: bool = False,
    ) -> None:
        self.architecture = architecture
        self._name = type(model).__name__
        self.plan = plan
        self.prepare = Pipeline(prepare, instruments, prove=prove)
        self.convert = convert
        self.weights = weights_of(model)
        self.original: Original | None = Original(model, plan.timestep)
        self.prepared: list[CapturedGraph] = []
        self.records: list[PassRecord] = []
        self.statistics = Statistics(transient=True) if statistics is None else statistics
        self.most_samples = keep
        self._samples: Spread[Sample] = Spread(keep)
        self._inputs: list[Spread[list[Tensor]]] = []
        self.calls = 0
        self.failure: FxquantError | None = None
        self.steps: list[float] = []
        self._last: dict[int, tuple[int, Any]] = {}  # By number of the graph: batch size and output of its last call.
        self._later = LaterSteps(0)
        self._lock = threading.Lock()  # Capture and statistics handle one call at a time.
        self._observed: list[fx.GraphModule] = []
        self._kinds: list[int] = []  # By number of the graph: the number of its kind of call in the statistics.
        self._keys: dict[str, dict[str, None]] = {}  # See fxquant.planning.uses.
        self._check = check
        self.journal: Journal | None = None
        self.alone = True  # Whether the calls of no other process belong to the same calibration.
        self._moments: LaterMoments | None = None

    def __deepcopy__(self, memo: Any) -> Calibration:
        """Refuse to copy. Calls of a copy of the model would also come here and calibrate."""
        raise _in_use(self._name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run one call of the model on its observed graph."""
        with self._lock:
            try:
                return self._forward(args, kwargs)
            except FxquantError as error:
                self.failure = self.failure or error
                raise

    def _forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        call = self.architecture.canonical(args, kwargs)
        leaves = call.leaves
        refuse_autocast(leaves)
        number = next((i for i, graph in enumerate(self.prepared) if graph.call.fits(call)), None)
        if number is None:
            number = self._capture(call)
        captured = self.prepared[number]
        first = self.plan.observed_step
        step = 0 if first is None else self._step(call)
        late = 0 if first is None else step - first
        if self._later.ended_before(step):
            self.observe_later()
        if late > 0 and number in self._last and self._last[number][0] == captured.call.batch_size(leaves):
            self._later.keep(step, number, call)
            return captured.output(self._last[number][1])  # After the observed step, the sampler gets this output.
        if late:
            output = self._run(number, call, observed=False)
            if late < 0:
                self._keep_sample(captured, call, output)
        else:
            output = self._observe(number, call)
        if first is not None:
            self._last[number] = captured.call.batch_size(leaves), output
        self.calls += 1
        return captured.output(output)

    def _observe(self, number: int, call: Call) -> Any:
        """Run a call on an observed graph, and keep of it what passes and the measurement want; returns the output."""
        captured = self.prepared[number]
        output = self._run(number, call, observed=True)
        self._keep_sample(captured, call, output)
        self._keep_inputs(number, call.leaves)
        if self._moments is not None:
            self._moments.keep(number, captured.inputs(call.leaves))
        self._keep_call(captured, self._kinds[number], call)
        return output

    def _run(self, number: int, call: Call, observed: bool) -> Any:
        """The leaves of the output of a call; an interrupted run may have computed them."""
        run = self.compute if self.journal is None else self.journal.run
        return run(number, call, observed)

    def compute(self, number: int, call: Call, observed: bool) -> Any:
        """Run a call on a graph; returns the leaves of the output."""
        module = self._observed[number] if observed else self.prepared[number].module
        with recording(self.statistics.record), torch.no_grad():
            return module(*self.prepared[number].inputs(call.leaves))

    def identity(self, number: int) -> str:
        """A digest of what a graph computes, with its weights."""
        return digest_of_graph(self.prepared[number].module)

    def observe_later(self) -> None:
        """Observe the later steps that are wanted, once the sampler has made its last step."""
        for number, call in self._later.take():
            self._observe(number, call)
            self.calls += 1

    def end_calls(self) -> None:
        """Observe what is left to observe, and keep it. Called after the last call."""
        self.observe_later()
        if self.journal is not None:
            self.journal.finish()

    def _step(self, call: Call) -> int:
        """Number of the denoising step of a call: how many other timesteps came before its own."""
        values = call.leaf(str(self.plan.timestep)).flatten().tolist()
        if len(set(values)) > 1:
            raise CalibrationError(
                "one denoising step is to be observed, but the samples of a call are at several timesteps: "
                f"{values[0]:g} and {max(values, key=lambda value: abs(value - values[0])):g}; calibrate with calls "
                "that have one timestep each, as samplers make them"
            )
        if values[0] not in self.steps:
            self.steps.append(values[0])
        return self.steps.index(values[0])

    def chosen_samples(self) -> list[Sample]:
        """The requested number of kept calls, spread over the whole calibration."""
        return self._samples.chosen()

    def inputs_of(self, number: int) -> list[list[Tensor]]:
        """Inputs of calls of one captured graph, for passes that run it again."""
        return self._inputs[number].chosen()

    def recall(self, number: int, inputs: Sequence[list[Tensor]], samples: Sequence[Sample]) -> None:
        """Take inputs of calls of a captured graph, and samples, from an earlier calibration in place of new calls."""
        for one in inputs:
            if self._inputs[number].wants_next():
                self._inputs[number].keep(one)
        for sample in samples:
            if self._samples.wants_next():
                self._samples.keep(sample)

    def finish(self) -> None:
        """Combine what several graphs of the model recorded for the same layer. Called after the last call.

        Raises:
            ConfigurationError: If an option of a pass matches nothing in any of the graphs.
            NonFiniteError: If a later step that is observed now holds NaN or infinity.
        """
        self.end_calls()
        for step in (*self.prepare.passes, *self.convert):
            ask(step, "check_plan", self.plan)
        combine([captured.module.graph for captured in self.prepared], self.plan, self._keys, self.statistics)
        if self._moments is not None:
            self._moments.begin(self._observed)
            self.statistics.later = self._moments

    def forget_observed(self) -> None:
        """Drop the observed graphs and the weights, so that tensors that passes replace are freed at once."""
        self._observed.clear()
        self._last.clear()
        self.weights = {}
        self.original = None

    def _capture(self, call: Call) -> int:
        tensors = [name for name, leaf in call.named if isinstance(leaf, Tensor)]
        if self.plan.timestep is not None and self.plan.timestep not in tensors:
            raise missing_timestep(self.plan.timestep, tensors)
        if self.original is not None:
            self.original.warm(call, self.architecture)
        captured = self.architecture.capture(call, [graph.call for graph in self.prepared])
        bind(captured.module, self.weights)
        if self.original is not None:
            self.original.compare(captured, call)
        inputs = [captured.inputs(call.leaves)] if self.prepare.prove else []
        # Calls without a batch dimension have the sizes that they were traced with.
        number = self.adopt(captured, inputs, max(captured.call.batch_size(call.leaves), 1))
        warn_of_many(call, [graph.call for graph in self.prepared])
        return number

    def adopt(self, captured: CapturedGraph, inputs: Sequence[list[Tensor]] = (), batch: int = 0) -> int:
        """Prepare a captured graph whose weights are bound, and make the graph that observes; returns its number.

        Args:
            captured: The graph.
            inputs: Inputs of calls on which passes are proved.
            batch: Batch size of the calls that will run; 0 if none will.

        Raises:
            MemoryLimitError: If memory is bounded by less than a call or a layer needs.
            CalibrationError: If the statistics hold another denoising step than the recipe observes.
        """
        records = self.prepare.run(captured.module, PassContext(self.plan, inputs=list(inputs)))
        self.records = self.records or records
        refuse_other_steps(self.statistics.run, self.plan)
        self._later.wanted = self.plan.later_steps
        steps = (*self.prepare.passes, *self.convert)
        check_repeats(steps, self.plan)
        for step in steps:
            ask(step, "check_graph", captured.module.graph, self.plan)
        self._check()
        observed = copy_graph(captured.module)
        options = {"weight_only": ";".join(n for n, layer in self.plan.quantized() if self._wants_float_input(layer))}
        Pipeline([PASSES["insert-observers"](**options)]).run(observed, self.plan, self.prepare.stage)
        for name, key in keys_in(self.plan, captured.module.graph):
            self._keys.setdefault(name, {})[key] = None
        layers = self.plan.layers.items()
        rounded = [name for name, own in layers if any(ask(step, "wants_moments", own) for step in self.convert)]
        require_largest(self.plan, rounded, observed.graph, batch)
        moments = frozenset(key for name in rounded for key in self._keys.get(name, ()))
        if moments and self._records_later():
            self._moments = self._moments or LaterMoments(self.statistics)
            self._moments.keys |= moments
        else:
            self.statistics.wants_moments = moments.__contains__
        self.prepared.append(captured)
        self._kinds.append(self.statistics.calls.kind(captured.call.to_json()))
        compared = self.prepare.prove or not all(step.keeps_inputs for step in self.convert)
        self._inputs.append(Spread(calls_wanted(self.convert) or (_COMPARED if compared else 0)))
        self._observed.append(observed)
        return len(self.prepared) - 1

    def _records_later(self) -> bool:
        """Whether second moments are recorded after calibration: where memory is bounded and nobody keeps them."""
        unkept = self.statistics.transient and self.statistics.run is None and self.journal is None
        return current() is not None and unkept and self.alone

    def _wants_float_input(self, layer: LayerPlan) -> bool:
        wanted = any(ask(step, "wants_statistics", layer) or ask(step, "wants_moments", layer) for step in self.convert)
        return wanted and layer.kind == "linear" and layer.activation_bits is None

    def _keep_sample(self, captured: CapturedGraph, call: Call, output: Sequence[Any]) -> None:
        if not self._samples.wants_next():
            return
        leaves, chosen = some_samples(captured, call.leaves, KEPT_SAMPLES)
        kept = call.with_leaves(leaves)
        first = next(leaf for leaf in output if isinstance(leaf, Tensor))
        if chosen is not None and first.dim() and first.shape[0] == captured.call.batch_size(call.leaves):
            first = first.index_select(0, chosen.to(first.device))
        self._samples.keep(Sample(timestep_of(kept, self.plan.timestep), kept.arguments(), first.clone()))

    def _keep_call(self, captured: CapturedGraph, kind: int, call: Call) -> None:
        timestep, calls = timestep_of(call, self.plan.timestep), self.statistics.calls
        priority = calls.wants(kind, timestep)
        if priority is not None:
            calls.keep(kind, timestep, priority, captured.inputs(some_samples(captured, call.leaves, RUN_SAMPLES)[0]))

    def _keep_inputs(self, number: int, leaves: Sequence[Any]) -> None:
        kept = self._inputs[number]
        if kept.wants_next():
            captured = self.prepared[number]
            kept.keep(captured.inputs(some_samples(captured, leaves, RUN_SAMPLES)[0]))


@contextmanager
def calls_redirected(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within this context, calls of the model run another function. The model is restored on exit in any case."""
    refuse_redirected(model)
    # If the model was compiled in place, its calls would bypass its forward.
    with instance_attribute(model, "_compiled_call_impl", None), instance_attribute(model, "forward", forward):
        yield


def refuse_redirected(model: nn.Module) -> None:
    """Raise if calls of the model already go to a calibration, of another thread or further up in this thread."""
    if isinstance(getattr(model.__dict__.get("forward"), "__self__", None), Calibration):
        raise _in_use(type(model).__name__)


def _in_use(name: str) -> ConfigurationError:
    return ConfigurationError(
        f"this {name} is being calibrated by another fxquant.compile; wait until that fxquant.compile returns"
    )


def run_calibration(calibration: Calibration, model: nn.Module, calibrate: Callable[[], Any]) -> None:
    """Run the user's callable and check that it called the model.

    Raises:
        CalibrationError: If the callable raised, or never called the model. The model is unchanged.
        FxquantError: Whatever typed error a call of the model raised, even if the callable swallowed it.
    """
    make_calls(calibration, model, calibrate)
    if not calibration.calls:
        raise not_called(model)
    calibration.finish()


def make_calls(calibration: Calibration, model: nn.Module, calibrate: Callable[[], Any]) -> None:
    """Run the user's callable, which may make no call: another process may make them.

    Raises:
        CalibrationError: If the callable raised, or made too few denoising steps. The model is unchanged.
        FxquantError: Whatever typed error a call of the model raised, even if the callable swallowed it.
    """
    if not callable(calibrate):
        raise CalibrationError(
            f"calibrate is a {type(calibrate).__name__}; pass a function that runs the model, such as "
            "calibrate=lambda: pipe(class_labels=labels, num_inference_steps=25)"
        )
    try:
        with calls_redirected(model, calibration.forward):
            calibrate()
    except FxquantError:
        raise
    except Exception as error:
        if calibration.failure is not None:
            raise calibration.failure from error
        raise CalibrationError(
            f"calibrate raised {type(error).__name__}: {error}. The model is unchanged; fix the callable and try again."
        ) from error
    if calibration.failure is not None:
        raise calibration.failure
    step = calibration.plan.observed_step
    if calibration.calls and step is not None and step >= len(calibration.steps):
        raise CalibrationError(
            f"step {step} is to be observed, counted from 0, but calibrate made {len(calibration.steps)}; make more "
            "steps, or observe an earlier one"
        )
