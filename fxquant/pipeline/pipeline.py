"""Passes and the pipeline that runs them.

A pass is a frozen dataclass whose fields are its options; it prints as ``balance-channels{exponent=0.5}`` and parses
from that text (:mod:`fxquant.pipeline.options`). The pipeline, not the pass, checks the order before anything runs,
verifies the graph before and after every pass against the specification of its stage, removes dead code, recompiles
and keeps the log.
"""

from __future__ import annotations

import enum
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import partial
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

from torch import fx

from fxquant.errors import ConfigurationError, FxquantError, PassError
from fxquant.ir.edits import EditLog
from fxquant.ir.fingerprint import Fingerprint
from fxquant.ir.names import count_ops
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.roles import assign_roles
from fxquant.ir.stages import SPECS, Stage, StageSpec, later, verify
from fxquant.ir.tensors import drop_unread_tensors
from fxquant.pipeline.conduct import check_conduct, check_decisions
from fxquant.pipeline.input_changes import InputWatch
from fxquant.pipeline.options import alike, option_types, print_value, read_named, read_options
from fxquant.pipeline.order import stage_after
from fxquant.pipeline.proving import Proof, Prover
from fxquant.pipeline.syntax import Reader
from fxquant.planning.context import PassContext
from fxquant.planning.decisions import LayerPlan
from fxquant.planning.plan import Plan
from fxquant.registry import Registry

log = logging.getLogger(__name__)


class Tier(enum.Enum):
    """What a pass does to numerics; the tier decides how the pass is proved."""

    EXACT = "exact"
    """The output stays the same bit for bit."""
    ALGEBRAIC = "algebraic"
    """Equal in real arithmetic: in float64 the outputs differ by rounding only."""
    LOSSY = "lossy"
    """Quantizes; the error is measured and reported."""


class Pass(ABC):
    """One rewrite. Subclasses are frozen dataclasses that set ``name``, ``tier``, ``requires`` and ``establishes``."""

    name: ClassVar[str]
    tier: ClassVar[Tier]
    requires: ClassVar[Stage]
    """The latest stage of a graph that the pass accepts; it also accepts earlier stages."""
    establishes: ClassVar[Stage]
    """The stage of the graph after the pass; a graph that was at a later stage before stays at that stage."""
    keeps_inputs: ClassVar[bool] = False
    """Whether layers read the same as before, but for factors and shifts in the plan. If not said, it is measured."""

    @abstractmethod
    def run(self, graph: fx.Graph, context: PassContext, rewriter: Rewriter) -> None:
        """Rewrite the graph through ``rewriter``: carry out what the plan holds; decide and add to it what it lacks.

        Args:
            graph: The graph.
            context: The plan, and the data from which the pass decides what the plan lacks.
            rewriter: Makes all edits.
        """

    def wants_statistics(self, layer: LayerPlan) -> bool:
        """Whether the pass needs input statistics of a linear whose activations stay float; other linears have them."""
        return False

    def wants_moments(self, layer: LayerPlan) -> bool:
        """Whether the pass needs second moments of a layer's input, which calibration records only on demand."""
        return False

    def wants_samples(self) -> int:
        """How many samples of calibration calls the pass runs again; it reads them from ``context.inputs``."""
        return 0

    def decides(self, name: str, layer: LayerPlan) -> bool:
        """Whether the pass decides about a layer; a second pass of its name with other options is then refused."""
        return False

    def check_graph(self, graph: fx.Graph, plan: Plan) -> None:  # noqa: B027  (most can carry out everything)
        """Refuse what the pass cannot carry out, before anything is observed; called with each calibrated graph.

        Raises:
            ConfigurationError: Names the layer and says what to change.
        """

    def check_plan(self, plan: Plan) -> None:  # noqa: B027
        """Refuse options that match nothing in the plan; called after calibration has seen all graphs.

        Raises:
            ConfigurationError: Names the option.
        """

    def __str__(self) -> str:
        shown = []
        for option in fields(self):  # type: ignore[arg-type]  # (subclasses are dataclasses)
            value = getattr(self, option.name)
            default = option.default_factory() if option.default_factory is not MISSING else option.default
            if not alike((value,), (default,)):  # An int may stand for a float.
                shown.append(f"{option.name.replace('_', '-')}={_print_value(type(self), option.name, value)}")
        return f"{self.name}{{{' '.join(shown)}}}" if shown else self.name


def _check_pass(name: str, cls: Any) -> None:
    if not (isinstance(cls, type) and issubclass(cls, Pass)):
        raise ConfigurationError(f"{cls!r} is not a subclass of fxquant.authoring.Pass")
    for attribute, kind in (("name", str), ("tier", Tier), ("requires", Stage), ("establishes", Stage)):
        if not isinstance(getattr(cls, attribute, None), kind):
            raise ConfigurationError(
                f"the pass {cls.__name__} does not say its {attribute}; add a class attribute of type {kind.__name__}"
            )
    if cls.name != name:
        raise ConfigurationError(f"the pass {cls.__name__} is called {cls.name!r}, and its entry point {name!r}")
    option_types(cls)


PASSES: Registry[type[Pass]] = Registry("pass", "fxquant.passes", _check_pass)
"""All known passes by name."""

P = TypeVar("P", bound=type[Pass])


def register_pass(cls: P) -> P:
    """Class decorator: make a pass known under its ``name``.

    Raises:
        ConfigurationError: If the pass lacks one of the attributes of a pass, or has an option of a type that cannot be
            printed and parsed (:mod:`fxquant.pipeline.options`); the message names the option.
        DuplicateNameError: If another pass has the name.
    """
    _check_pass(getattr(cls, "name", ""), cls)
    PASSES.register(cls.name)(cls)
    return cls


def parse_pass(text: str) -> Pass:
    """Make a pass from its text, such as ``balance-channels{exponent=0.5 salience=max}``.

    Raises:
        UnknownNameError: If there is no such pass.
        ConfigurationError: If the text or an option cannot be read.
    """
    name, options = read_named(text, "pass", _options_of)
    return PASSES[name](**options)


def parse_passes(reader: Reader, end: str = "") -> list[Pass]:
    """Make passes from the text of a reader, separated by commas, up to a character of ``end``; see :func:`parse_pass`.

    Raises:
        UnknownNameError: If there is no such pass.
        ConfigurationError: If the text or an option cannot be read.
    """
    return [PASSES[item.name](**read_options(item, reader, _options_of)) for item in reader.items(end)]


def check_text(step: Pass) -> None:
    """Check that the text of a pass stands for the pass: that it would be read back as an equal one.

    Raises:
        ConfigurationError: If the pass has an option that cannot be printed and parsed.
    """
    cls = type(step)
    try:
        _, options = read_named(str(step), "pass", lambda _: option_types(cls))
    except ConfigurationError as error:
        raise ConfigurationError(f"pass {step.name} cannot be written as text and read back: {error}") from error
    if cls(**options) != step:
        raise ConfigurationError(
            f"pass {step} would be read back from this text as {cls(**options)!r}, not as {step!r}; its options should "
            "be compared by their values"
        )


def _options_of(name: str) -> dict[str, Any]:
    return option_types(PASSES[name])


def _print_value(cls: type[Pass], option: str, value: Any) -> str:
    try:
        return print_value(value, option_types(cls)[option])
    except ConfigurationError as error:
        raise ConfigurationError(f"pass {cls.name}: option {option}: {error}") from None


@dataclass(frozen=True)
class PassRecord:
    """What one pass did.

    Attributes:
        text: The pass with its options.
        seconds: Wall time, verification included.
        edits: Number of changes to the graph.
        ops: Change in the number of nodes by op.
        log: The changes one by one.
        proof: What was measured, if the pipeline proves its passes.
    """

    text: str
    seconds: float
    edits: int
    ops: dict[str, int] = field(default_factory=dict)
    log: EditLog = field(default_factory=EditLog, compare=False, repr=False)
    proof: Proof | None = None

    def __str__(self) -> str:
        changes = " ".join(f"{op}:{count:+d}" for op, count in sorted(self.ops.items()))
        return f"{self.text}: {self.edits} edits in {self.seconds:.2f} s {changes}".rstrip()


class Instrument(Protocol):
    """Watches a pipeline run. Inspection and failures use the same three methods."""

    def before(self, step: Pass, module: fx.GraphModule) -> None:
        """Called with the graph that the pass is about to change."""

    def after(self, step: Pass, module: fx.GraphModule, record: PassRecord) -> None:
        """Called with the verified graph."""

    def failed(self, step: Pass, module: fx.GraphModule, error: Exception) -> None:
        """Called with the graph as the failing pass left it."""


@runtime_checkable
class ReadsContext(Protocol):
    """An instrument that also gets what passes decide from."""

    def enter(self, step: Pass, context: PassContext, stage: Stage) -> None:
        """Called before :meth:`Instrument.before`, with the stage of the graph before the pass."""


@runtime_checkable
class WatchesLowering(Protocol):
    """An instrument that is also called after a backend lowered a graph."""

    def lowered(self, backend: str, module: fx.GraphModule) -> None:
        """Called with the name of the backend and the verified graph."""


@runtime_checkable
class ShowsProgress(Protocol):
    """An instrument that also shows the progress of long passes; without one, such a pass draws a bar itself."""

    def progress(self, step: Pass, what: str, done: int, total: int) -> None:
        """Called repeatedly while the pass runs: ``done`` of ``total`` steps are finished, ``what`` is in progress."""


class Pipeline:
    """A list of passes that run one after the other.

    Args:
        passes: The passes in order.
        instruments: Observers of the run.
        prove: Run the graph before and after each exact and algebraic pass on ``context.inputs``, and refuse a pass
            that does not keep its tier (:mod:`fxquant.pipeline.proving`).

    Raises:
        ConfigurationError: If an earlier pass brings the graph to a stage that a later pass does not accept, or a pass
            has an option that its text cannot stand for.
    """

    def __init__(self, passes: Sequence[Pass], instruments: Sequence[Instrument] = (), *, prove: bool = False) -> None:
        self.passes = tuple(passes)
        self.prove = prove
        self.instruments = tuple(instruments)
        for step in self.passes:
            check_text(step)
        self.stage = self.stage_after(Stage.CAPTURED)

    def stage_after(self, stage: Stage) -> Stage:
        """The stage of a graph after all passes; see :mod:`fxquant.pipeline.order`."""
        return stage_after(self.passes, stage)

    @classmethod
    def parse(cls, text: str, instruments: Sequence[Instrument] = ()) -> Pipeline:
        """Make a pipeline from text, passes separated by commas; errors as for :func:`parse_pass`."""
        return cls(parse_passes(Reader(text, "pass")), instruments)

    def __str__(self) -> str:
        return ",".join(str(step) for step in self.passes)

    def run(
        self, module: fx.GraphModule, context: PassContext | Plan, stage: Stage = Stage.CAPTURED
    ) -> list[PassRecord]:
        """Run all passes on ``module`` in place.

        Args:
            module: The graph.
            context: The plan with what passes decide from, or a plan alone.
            stage: The stage of the graph.

        Raises:
            PassError: If a pass raises an error that is not an :class:`FxquantError`, edits the graph past the
                rewriter, changes its inputs or outputs, puts a value into the plan that no plan can hold, or never
                ends; names the pass. Graph and plan are then what they were before the pass, but for weights that it
                already dropped (:meth:`Rewriter.forget`) or changed in place. The same holds for the other errors.
            ProofError: If a pass does not keep its tier, with ``prove``.
            ConfigurationError: If the plan is not valid before the first pass.
            FxquantError: If a pass or the verification raises one; a note names the pass.
        """
        self.stage_after(stage)
        if isinstance(context, Plan):
            context = PassContext(context)
        if self.prove and not context.inputs:
            wanted = "give PassContext(plan, inputs=[[tensor, ...], ...])"
            raise ConfigurationError(f"prove=True needs calls to compare the graph on; {wanted}")
        context.plan.checked_json()  # So that no pass is blamed for what it was given.
        verify(module, SPECS[stage])
        records = []
        for number, step in enumerate(self.passes, 1):
            for instrument in self.instruments:
                if isinstance(instrument, ReadsContext):
                    instrument.enter(step, context, stage)
            stage = later(stage, step.establishes)
            record = self._run_one(step, module, context, SPECS[stage])
            log.info("%d/%d %s", number, len(self.passes), record)
            records.append(record)
        return records

    def _run_one(self, step: Pass, module: fx.GraphModule, context: PassContext, spec: StageSpec) -> PassRecord:
        for instrument in self.instruments:
            instrument.before(step, module)
        began, ops = time.perf_counter(), count_ops(module.graph)
        rewriter, fingerprint = Rewriter(module, step.name), Fingerprint(module, thorough=self.prove)
        rewriter.fingerprint = fingerprint
        shown = [instrument for instrument in self.instruments if isinstance(instrument, ShowsProgress)]
        prover = Prover(step, module, context) if self.prove and step.tier is not Tier.LOSSY else None
        watched = context.statistics is not None and not step.keeps_inputs
        watch = InputWatch(step, module, context) if watched else None
        own = replace(context, memo={}, progress=partial(_show, shown, step) if shown else None)
        earlier, text, proof = context.for_trial(), str(step), None
        try:
            found = step.run(module.graph, own, rewriter)
            check_conduct(text, str(step), found)
            check_decisions(text, own.plan, context.plan, earlier.plan)
            fingerprint.check(text, rewriter.edits)
            if rewriter.edits:
                module.graph.eliminate_dead_code()
                drop_unread_tensors(module)
                module.recompile()
                assign_roles(module.graph)
                verify(module, spec)
                proof = None if prover is None else prover.check(module, rewriter.edits)
                if watch is not None:
                    watch.check(module)
            elif spec.check is not None:  # The pass says that the graph meets the condition as it is.
                verify(module, spec)
        except BaseException as error:
            try:
                if isinstance(error, Exception):
                    self._tell(step, module, error)
            finally:
                lost = fingerprint.restore()
                context.take_back(earlier)
            if lost:
                error.add_note(f"the graph is as it was before, without the values of {', '.join(lost[:3])}, ...")
            if isinstance(error, FxquantError) or not isinstance(error, Exception):  # KeyboardInterrupt, for example.
                error.add_note(f"in pass {step}")
                raise
            told = str(error).partition("\ngraph():")[0]  # The lint of torch appends the whole graph.
            failure = PassError(f"pass {step} failed: {type(error).__name__}: {told}")
            for note in getattr(error, "__notes__", ()):  # A note says where an instrument wrote its reproducer.
                failure.add_note(note)
            raise failure from error
        after = count_ops(module.graph)
        change = {op: after[op] - ops[op] for op in sorted({*ops, *after}) if after[op] != ops[op]}
        record = PassRecord(str(step), time.perf_counter() - began, rewriter.edits, change, rewriter.log, proof)
        for instrument in self.instruments:
            instrument.after(step, module, record)
        return record

    def _tell(self, step: Pass, module: fx.GraphModule, error: Exception) -> None:
        """Tell the instruments of a failure; if one of them fails too, the error of the pass is what counts."""
        for instrument in self.instruments:
            try:
                instrument.failed(step, module, error)
            except Exception as other:
                error.add_note(f"the instrument {type(instrument).__name__} failed as well: {other!r}")


def _show(shown: Sequence[ShowsProgress], step: Pass, what: str, done: int, total: int) -> None:
    for instrument in shown:
        instrument.progress(step, what, done, total)
