"""Every decision about one layer or attention: what was decided, by which pass, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fxquant.errors import FxquantError
from fxquant.inspect.decisions import described
from fxquant.ir.edits import Span, span_of
from fxquant.pipeline.pipeline import Pass
from fxquant.pipeline.recipes import Recipe
from fxquant.planning.decisions import AttentionPlan, Balance, LayerPlan, Shift
from fxquant.planning.plan import Plan
from fxquant.planning.precision import overridden

_QUANTIZERS = {"linear": "quantize-linears", "conv": "quantize-convolutions", "embedding": "quantize-embeddings"}


@dataclass(frozen=True)
class Choice:
    """One decision.

    Attributes:
        pass_text: The pass that decided, with its options; its name alone if the recipe cannot be read here.
        about: What it is about: ``precision``, ``statistics``, ``timesteps``, ``shift``, ``balance``, ``rounding``,
            ``range``, or the name of the field of another pass's decision.
        decided: What was decided, as text.
        reason: Why, or None if the plan does not say.
    """

    pass_text: str
    about: str
    decided: str
    reason: str | None = None


def choices_of(plan: Plan, name: str) -> tuple[Choice, ...]:
    """All decisions about a layer or an attention of a plan, in the order of the passes."""
    made = list(_Choices(plan, name).all()) if name in plan.layers else []
    if name in plan.attentions:
        made += _of_attention(plan, name)
    for of, about, entry in plan.pass_decisions.stored():
        if about == name:
            made += [Choice(of, option, str(value)) for option, value in entry.values.items() if value is not None]
            made += [Choice(of, option, described(tensor)) for option, tensor in entry.tensors.items()]
    return tuple(made)


def passes_of(plan: Plan) -> dict[str, Pass]:
    """The passes of a plan's recipe by name; empty if the recipe names a pass that is not installed here."""
    try:
        recipe = Recipe.parse(plan.recipe)
    except FxquantError:
        return {}
    return {step.name: step for step in (*recipe.prepare, *recipe.convert)}


def factors_of(plan: Plan, name: str) -> Span | None:
    """Smallest and largest balance factor of a layer's input channels; the activations were divided by them."""
    return span_of(plan.vectors.get(name))


def shifts_of(plan: Plan, name: str) -> Span | None:
    """Smallest and largest number that was subtracted from a layer's input channels, over all bins of timesteps."""
    return span_of(plan.vectors.get(f"{name}.shift"))


@dataclass
class _Choices:
    plan: Plan
    name: str

    def __post_init__(self) -> None:
        self.layer: LayerPlan = self.plan.layers[self.name]
        self.passes = passes_of(self.plan)

    def all(self) -> Iterator[Choice]:
        yield Choice(self._text("assign-precision"), "precision", str(self.layer.precision), self._why_precision())
        yield self._statistics()
        if {"group-timesteps", "bin-ranges"} & self.passes.keys() or self.layer.timesteps is not None:
            yield self._timesteps()
        if "shift-channels" in self.passes or self.layer.shift is not None:
            yield self._change("shift-channels", "shift", self.layer.shift, shifts_of(self.plan, self.name))
        if "balance-channels" in self.passes or self.layer.balance is not None:
            yield self._change("balance-channels", "balance", self.layer.balance, factors_of(self.plan, self.name))
        yield from self._quantization()

    def _text(self, name: str) -> str:
        return str(self.passes.get(name, name))

    def _why_precision(self) -> str | None:
        if self.layer.reason is not None:
            return self.layer.reason
        step = self.passes.get("assign-precision")
        if step is None:
            return None
        if overridden(self.name, getattr(step, "overrides", "")) is not None:
            return "an override gives it these bits"
        if self.layer.weight_bits is None or self.layer.activation_bits is None:
            return None
        return f"the recipe quantizes layers of role {self.layer.role}"

    def _statistics(self) -> Choice:
        key = self.layer.observed
        if key is None:
            why = "no pass needs statistics of its input"
            return Choice("insert-observers", "statistics", "not observed", why)
        others = [name for name, layer in self.plan.layers.items() if layer.observed == key and name != self.name]
        shared = f", with {', '.join(others)}, which read the same value" if others else ""
        return Choice("insert-observers", "statistics", f"observed as {key}{shared}")

    def _timesteps(self) -> Choice:
        groups = self.layer.timesteps
        # Groups come with the dendrogram that they were cut from; bins of ranges alone have none.
        only_ranges = "bin-ranges" in self.passes and (groups is None or not groups.dendrogram)
        step = "bin-ranges" if only_ranges else "group-timesteps"
        text = self._text(step)
        if groups is None:
            return Choice(text, "timesteps", "one bin", self._why_not_transformed(step))
        count = len(groups.boundaries) + 1
        return Choice(text, "timesteps", "one bin" if count == 1 else f"{count} bins", groups.reason)

    def _change(self, step: str, about: str, entry: Balance | Shift | None, span: Span | None) -> Choice:
        if entry is None:
            return Choice(self._text(step), about, "not requested", self._why_not_transformed(step))
        if entry.cost == "not":
            return Choice(self._text(step), about, "not done: nothing upstream can absorb it", entry.reason)
        parts = [f"{entry.channels} of {self.layer.shape[1]} channels, absorbed at cost {entry.cost}"]
        if entry.into:
            parts[0] += f" into {', '.join(entry.into)}"
        if span is not None:
            what = "divided by" if about == "balance" else "reduced by"
            parts.append(f"the input is {what} {span[0]:.4g}..{span[1]:.4g}")
        if isinstance(entry, Balance) and entry.group not in (None, self.name):
            parts.append(f"decided together with {entry.group}")
        if isinstance(entry, Shift) and entry.balanced:
            parts.append("of the balanced input")
        return Choice(self._text(step), about, "; ".join(parts), entry.reason)

    def _why_not_transformed(self, step: str) -> str | None:
        wanted = getattr(self.passes.get(step), "roles", None)
        if self.layer.kind != "linear":
            return f"it is a layer of kind {self.layer.kind}, and only linears are transformed"
        if isinstance(wanted, str) and self.layer.role not in wanted.split("+"):
            return f"its role is {self.layer.role}, and the pass transforms layers of role {wanted.replace('+', ', ')}"
        if self.layer.weight_bits is None:
            return "its weight stays float"
        return "its activations stay float" if self.layer.activation_bits is None else None

    def _quantization(self) -> Iterator[Choice]:
        layer, step = self.layer, self.passes.get(_QUANTIZERS.get(self.layer.kind, ""))
        text = str(step) if step is not None else _QUANTIZERS.get(layer.kind, "quantize")
        if layer.weight_bits is None:
            return
        if step is None and self.passes:
            yield Choice(text, "rounding", "stays float", f"the recipe has no pass {text}, which quantizes this kind")
            return
        yield Choice(text, "rounding", self._rounding(step))
        if layer.activation is not None:
            yield Choice(text, "range", f"found by {layer.activation.method}", self._why_range())

    def _rounding(self, step: Pass | None) -> str:
        method = getattr(getattr(step, "rounding", None), "value", "nearest")
        if self.layer.weight_bits == 8 and self.layer.activation_bits is None:
            method = "nearest"
        if "reconstruct-blocks" in self.passes and self.layer.kind == "linear":
            method = "learned by reconstruct-blocks"
        groups, rows = self.layer.group_size, self.layer.group_rows
        grids = f"one grid per {groups} input channels" if groups else "one grid per output channel"
        if rows != 1:
            grids += f", shared by {rows or 'all'} output channels"
        return f"{self.layer.weight_format or f'{self.layer.weight_bits} bits'}, {method}, {grids}"

    def _why_range(self) -> str | None:
        assert self.layer.activation is not None
        format = self.layer.format_of_input
        if format is not None and format.block:
            return f"every block of {format.block} channels gets its own scale when the model runs"
        if self.layer.activation.method == "dynamic":
            return "every token gets its own range when the model runs; the plan holds the extremes of calibration"
        return None


def _of_attention(plan: Plan, name: str) -> list[Choice]:
    entry: AttentionPlan = plan.attentions[name]
    passes = passes_of(plan)
    bits = "float" if entry.bits is None else f"q, k and v in {entry.format or f'{entry.bits} bits'}"
    found = [Choice(str(passes.get("assign-precision", "assign-precision")), "precision", bits, entry.reason)]
    if entry.bits is not None:
        text = str(passes.get("quantize-attention", "quantize-attention"))
        found.append(Choice(text, "precision", f"the softmax output in {entry.softmax_bits} bits"))
        found += [Choice(text, "range", f"{side}: found by {one.method}") for side, one in entry.ranges.items()]
    return found
