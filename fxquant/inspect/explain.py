"""The whole story of one layer: every decision with its pass and reason, and what the passes made of the layer."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from numbers import Real
from types import NoneType
from typing import Any

import torch
from torch import nn

from fxquant.errors import ConfigurationError, UnknownNameError, check_type
from fxquant.inspect.adapters import BranchReport, branches_of
from fxquant.inspect.choices import Choice, choices_of
from fxquant.inspect.history import History, rewrite_history
from fxquant.inspect.plans import plan_of
from fxquant.inspect.report import report
from fxquant.inspect.sizes import bytes_of, dtype_of_plan, shared_with, weight_bytes
from fxquant.inspect.sources import Source, plan_if_alone
from fxquant.inspect.story import Event, belongs, events_of
from fxquant.inspect.tables import attention_bits
from fxquant.ir.time_tables import bin_of
from fxquant.planning.attribution import LayerErrors, to_db
from fxquant.planning.decisions import ActivationRange
from fxquant.planning.plan import Plan
from fxquant.text import decimal, json_values, nearest, size, wrapped


@dataclass(frozen=True)
class BinRange:
    """The range of a value at some timesteps.

    Attributes:
        of: ``input``; for an attention ``q``, ``k`` or ``v``.
        number: Number of the bin, counted from 0, the smallest timesteps first.
        above: The timesteps of the bin are above this one; None for the first bin.
        up_to: The timesteps of the bin are at most this one; None for the last bin.
        timesteps: The calibrated timesteps in the bin.
        low: Smallest value that its grid holds.
        high: Largest value that its grid holds.
    """

    of: str
    number: int
    above: float | None
    up_to: float | None
    timesteps: tuple[float, ...]
    low: float
    high: float

    @property
    def interval(self) -> str:
        """The timesteps of the bin as text, such as ``t <= 250``."""
        if self.above is None and self.up_to is None:
            return "all timesteps"
        left = "" if self.above is None else f"{self.above:g} < "
        return f"{left}t" + ("" if self.up_to is None else f" <= {self.up_to:g}")


@dataclass(frozen=True)
class Explanation:
    """What was decided for one layer, why, and what it became; prints as text.

    Attributes:
        name: The layer; or the attention, or the matrix product that stays float.
        kind: ``linear``, ``conv``, ``embedding``, ``attention`` or ``product``.
        role: Part of the network: ``block``, ``adaln``, ``embedder``, ``patch`` or ``final``; empty if it is no layer.
        precision: Bits as text: ``w4a8``, ``w4a16-g64``, ``float``.
        shape: Output and input features of a layer.
        kernel: What runs it on the plan's backend.
        reason: Why it, or its activations, stay float; None if neither does.
        choices: Every decision, in the order of the passes.
        ranges: The range of its input for each bin of timesteps; of q, k and v of an attention.
        spread: Smallest and largest maximum of |input| over the calibrated timesteps.
        sqnr_db: Signal to quantization noise in dB, by what was measured: ``weight``, ``input``, ``q``, ``k``, ``v``.
        bytes_before: Bytes of its tensors in the float model.
        bytes_after: Bytes of its tensors, as checkpoints store them: codes, grids and bias.
        bytes_shared: The other layers that read some of these tensors too.
        bytes_of_weight: Whether the bytes are those of the weight alone, because a plan does not know of a bias.
        timestep: The timestep that was asked for, or None.
        bin: Number of the bin of that timestep, or None.
        module_class: Class of the module, such as ``torch.nn.modules.linear.Linear``.
        source: The line of the model's code that runs it, or None if that is not known.
        errors: Errors of this layer alone at each timestep, if ``fxquant attribute`` measured them.
        share: Its part of the sum of the contributions of all layers to the output error, 0 to 1; None if not known.
        events: What each pass did to its nodes and tensors. Empty for a plan alone, which has no graph.
        nodes: Its nodes in the lowered graph, as ``name = op (role)``.
        adapters: What LoRAs add beside the layer; everything above is without them.
    """

    name: str
    kind: str
    role: str
    precision: str
    shape: tuple[int, int] | None
    kernel: str
    reason: str | None
    choices: tuple[Choice, ...]
    ranges: tuple[BinRange, ...] = ()
    spread: tuple[float, float] | None = None
    sqnr_db: dict[str, float] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0
    bytes_shared: tuple[str, ...] = ()
    bytes_of_weight: bool = False
    timestep: float | None = None
    bin: int | None = None
    module_class: str = ""
    source: str | None = None
    errors: LayerErrors | None = None
    share: float | None = None
    events: tuple[Event, ...] = ()
    nodes: tuple[str, ...] = ()
    adapters: tuple[BranchReport, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The explanation as JSON values. Numbers that are not finite are text."""
        values = json_values(asdict(self))
        assert isinstance(values, dict)
        return values

    def __str__(self) -> str:
        return "\n\n".join(
            filter(None, [self._head(), self._decisions(), self._ranges(), self._errors(), self._story()])
        )

    def _head(self) -> str:
        of = "" if self.shape is None else f" {self.shape[1]} -> {self.shape[0]}"
        role = f", role {self.role}" if self.role else ""
        rows = [("layer", f"{self.name}: {self.kind}{of}{role}"), ("precision", self.precision)]
        if self.reason:
            rows.append(("float because", self.reason))
        rows.append(("kernel", self.kernel))
        if self.bytes_before:
            shared = f", shared with {', '.join(self.bytes_shared)}" if self.bytes_shared else ""
            alone = " for the weight; a plan alone does not know the bias" if self.bytes_of_weight else ""
            rows.append(("bytes", f"{size(self.bytes_before)} -> {size(self.bytes_after)}{shared}{alone}"))
        if self.sqnr_db:
            rows.append(("SQNR", ", ".join(f"{what} {decimal(db)} dB" for what, db in self.sqnr_db.items())))
        if self.spread is not None:
            rows.append(("max|x|", f"{self.spread[0]:.4g}..{self.spread[1]:.4g} over the calibrated timesteps"))
        rows += [("LoRA", str(branch)) for branch in self.adapters]
        if self.module_class:
            rows.append(("module", self.module_class))
        rows.append(("code", self.source or "not known from a plan alone; give the model or the checkpoint"))
        return "\n".join(f"{title:<14} {text}" for title, text in rows)

    def _decisions(self) -> str:
        lines = []
        for choice in self.choices:
            because = f" ({choice.reason})" if choice.reason else ""
            lines += wrapped(f"{choice.about}: {choice.decided}{because}  [{choice.pass_text}]")
        return "\n".join(["decisions", *lines]) if lines else ""

    def _ranges(self) -> str:
        shown = [one for one in self.ranges if self.bin is None or one.number == self.bin or one.of != "input"]
        if not shown:
            return ""
        asked = "" if self.timestep is None else f" at timestep {self.timestep:g}"
        lines = [f"ranges{asked}"]
        for one in shown:
            seen = f", calibrated at {_listed(one.timesteps)}" if one.timesteps else ""
            lines += wrapped(f"{one.of}: {one.low:.4g}..{one.high:.4g}  bin {one.number}: {one.interval}{seen}")
        return "\n".join(lines)

    def _errors(self) -> str:
        if self.errors is None:
            return ""
        share = "" if self.share is None else f"; {100 * self.share:.1f} % of the contributions of all layers"
        lines = [f"errors of this layer alone{share}"]
        steps, asked = self.errors.timesteps, self.timestep
        shown = steps if asked is None else (min(steps, key=lambda known: abs(known - asked)),)
        for step, local, output in zip(steps, self.errors.local, self.errors.contribution, strict=True):
            if step in shown:
                lines.append(f"  timestep {step:g}: its output {_db(local)}, the model's output {_db(output)}")
        return "\n".join(lines)

    def _story(self) -> str:
        lines = []
        for event in self.events:
            lines.append(f"  {event.step}")
            lines += [f"    {text}" for text in (*event.nodes, *event.tensors)]
            lines += [f"    absorbed by {text}" for text in event.elsewhere]
        return "\n".join(["what the passes did", *lines]) if lines else ""


def explain(
    source: Source,
    layer: str,
    *,
    timestep: float | None = None,
    model: nn.Module | type[nn.Module] | None = None,
    graph: int = 0,
    history: History | None = None,
) -> Explanation:
    """Explain everything that fxquant did to one layer of a quantized model. No weights are read.

    Args:
        source: What ``fxquant.compile`` or ``fxquant.load`` returned, the folder of a checkpoint or of a pipeline with
            one, or a plan. A plan alone, without ``model``, has no graph: the code and the steps are then missing.
        layer: Name of a layer, of an attention, or of a matrix product that stays float, as the report shows them.
        timestep: Show the range at this timestep, in place of all bins.
        model: As for :func:`fxquant.rewrite_history`.
        graph: Number of the graph, among the graphs that calibration captured.
        history: The history, if it is known already.

    Raises:
        UnknownNameError: If there is no such layer. The message names the nearest ones.
        ConfigurationError: If the source is none of these, the timestep is not finite, the layer has no range at it,
            or an argument is of another type.
        CheckpointError: If the folder holds no checkpoint, or a damaged one.
    """
    check_type("layer", layer, str, "the name of a layer")
    check_type("timestep", timestep, (Real, NoneType), "a number, or None for all timesteps")
    check_type("graph", graph, int, "the number of a graph")
    check_type("history", history, (History, NoneType), "what fxquant.rewrite_history returned, or None")
    if timestep is not None and not math.isfinite(timestep):
        raise ConfigurationError(f"timestep={timestep} is not a timestep; give a finite number")
    source = plan_if_alone(source)
    plan = plan_of(source)
    known = [*plan.layers, *plan.attentions, *plan.products]
    if layer not in known:
        raise UnknownNameError("layer", layer, nearest(layer, known))
    found = _from_plan(source, plan, layer, timestep)
    if isinstance(source, Plan) and model is None and history is None:
        return found
    return _with_history(found, plan, history or rewrite_history(source, model=model, graph=graph))


def _from_plan(source: Source, plan: Plan, name: str, timestep: float | None) -> Explanation:
    """What the plan says."""
    if name in plan.products:
        return Explanation(name, "product", "", "float", None, "aten float", plan.products[name], ())
    rows = report(source)
    choices = choices_of(plan, name)
    if name in plan.attentions:
        (own,) = (row for row in rows.attentions if row.name == name)
        entry = plan.attentions[name]
        bits = attention_bits(entry.bits, entry.softmax_bits)
        ranges = tuple(one for side, held in entry.ranges.items() for one in _bins(side, held, (), plan))
        found = Explanation(name, "attention", "", bits, None, own.kernel, entry.reason, choices, ranges)
        return replace(found, sqnr_db=dict(entry.sqnr_db), timestep=timestep, **_measured(plan, name))
    layer = plan.layers[name]
    (row,) = (row for row in rows.layers if row.name == name)
    ranges = () if layer.activation is None else tuple(_bins("input", layer.activation, layer.boundaries, plan))
    before, after = weight_bytes(layer, dtype_of_plan(plan))
    beside = tuple(branch for branch in branches_of(source) if branch.layer in (name, name.partition("@")[0]))
    noise = {"weight": layer.weight_sqnr_db, "input": layer.activation_sqnr_db}
    number = None
    if timestep is not None:
        if not ranges:
            raise ConfigurationError(
                f"layer {name} has no range of its input, so none at timestep {timestep:g}: "
                f"{layer.reason or 'its activations stay float'}"
            )
        static = len(ranges) == 1
        number = 0 if static else int(bin_of(layer.boundaries, torch.tensor(float(timestep))))
    return Explanation(
        name=name,
        kind=layer.kind,
        role=layer.role,
        precision=str(layer.precision),
        shape=(layer.shape[0], layer.shape[1]),
        kernel=row.kernel,
        reason=layer.reason,
        choices=choices,
        ranges=ranges,
        spread=row.spread,
        sqnr_db={what: db for what, db in noise.items() if db is not None},
        bytes_before=before,
        bytes_after=after,
        bytes_of_weight=True,
        timestep=timestep,
        bin=number,
        adapters=beside,
        **_measured(plan, name),
    )


def _measured(plan: Plan, name: str) -> dict[str, Any]:
    """The errors of a layer, if they were measured."""
    known = plan.attribution
    if known is None or name not in known.layers:
        return {}
    return {"errors": known.of(name), "share": known.share(name)}


def _db(error: float | None) -> str:
    db = to_db(error)
    return "not measured" if db is None else f"{decimal(db)} dB"


def _bins(of: str, held: ActivationRange, boundaries: tuple[float, ...], plan: Plan) -> list[BinRange]:
    lows, highs = held.ends
    edges: list[float | None] = [None, *boundaries, None] if len(lows) > 1 else [None, None]
    steps = bin_of(boundaries, torch.tensor(plan.timesteps)).tolist() if len(lows) > 1 else [0] * len(plan.timesteps)
    return [
        BinRange(
            of,
            number,
            edges[number],
            edges[number + 1],
            tuple(step for step, own in zip(plan.timesteps, steps, strict=True) if own == number),
            low,
            high,
        )
        for number, (low, high) in enumerate(zip(lows, highs, strict=True))
    ]


def _with_history(found: Explanation, plan: Plan, history: History) -> Explanation:
    """Add what the graph says: code, bytes, steps and nodes."""
    first, last = history.steps[0].nodes, history.steps[-1].nodes
    own = [state for state in first if found.name in state.roles and state.kind == "call"]
    place = found.name.partition("@")[0]
    own = own or [state for state in first if state.kind == "call" and state.module == place]
    own = own or [state for state in first if state.kind == "call" and belongs(state, place)]
    if found.kind == "product":
        path, _, line = found.name.rpartition(":")
        own = [state for state in first if state.kind == "call" and f":{line} in " in (state.source or "")]
        own = [state for state in own if path.startswith(state.module)]
    stored = next((step for step in reversed(history.steps) if step.phase != "lower"), history.steps[-1]).nodes
    layer = plan.layers.get(found.name)
    into = [name for entry in (layer and layer.balance, layer and layer.shift) if entry for name in entry.into]
    if found.kind in ("attention", "product"):
        return replace(
            found,
            module_class=own[0].module_class if own else "",
            source=own[0].source if own else None,
            events=tuple(events_of(history, place)) if found.kind == "attention" else (),
        )
    product = [state for state in last if found.name in state.roles and state.kind == "call"]
    return replace(
        found,
        bytes_before=bytes_of(first, found.name) or found.bytes_before,
        bytes_after=bytes_of(stored, found.name) or found.bytes_after,
        bytes_shared=shared_with(first, found.name),
        bytes_of_weight=False,
        module_class=own[0].module_class if own else "",
        source=own[0].source if own else None,
        events=tuple(events_of(history, found.name, into)),
        nodes=tuple(f"{state.name} = {state.target} ({state.roles[found.name]})" for state in product),
    )


def _listed(timesteps: tuple[float, ...]) -> str:
    if len(timesteps) <= 6:
        return ", ".join(f"{step:g}" for step in timesteps)
    return f"{len(timesteps)} timesteps, {timesteps[0]:g} to {timesteps[-1]:g}"
