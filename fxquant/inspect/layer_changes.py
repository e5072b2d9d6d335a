"""Decisions about layers that differ between two plans, and how they are shown in groups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxquant.inspect.tables import attention_bits, span_of
from fxquant.ir.edits import span_of as span_of_tensor
from fxquant.planning.decisions import ActivationRange, AttentionPlan, Balance, LayerPlan, Shift
from fxquant.planning.pass_decisions import same_tensors
from fxquant.planning.plan import Plan
from fxquant.text import name_of_all, of_any_block, pattern_of, size

_MEASURED = ("weight dB", "input dB", "range", "max|x|", "factors", "shifts", "q", "k", "v", "q dB", "k dB", "v dB")
"""Numbers that differ from layer to layer; layers that differ only in them share a row."""


@dataclass(frozen=True)
class LayerChange:
    """What differs for one layer or attention.

    Attributes:
        name: Its name.
        what: For each decision that differs, its values on the left and on the right, as text.
    """

    name: str
    what: Mapping[str, tuple[str, str]]


def layer_changes(left: Plan, right: Plan) -> list[LayerChange]:
    """The layers and attentions that both plans have, and decide differently."""
    found = []
    for name in [*left.layers, *left.attentions]:
        sides = [_facts(plan, name) for plan in (left, right) if name in plan.layers or name in plan.attentions]
        if len(sides) < 2:
            continue
        keys = dict.fromkeys([*sides[0], *sides[1]])
        what = {key: (sides[0].get(key, "-"), sides[1].get(key, "-")) for key in keys}
        what = {key: pair for key, pair in what.items() if pair[0] != pair[1]}
        for suffix, key in (("", "factors"), (".shift", "shifts")):
            vectors = [
                {"": plan.vectors[f"{name}{suffix}"]} for plan in (left, right) if f"{name}{suffix}" in plan.vectors
            ]
            if key not in what and len(vectors) == 2 and not same_tensors(*vectors):
                what[key] = (_of_tensor(vectors[0][""]), f"{_of_tensor(vectors[1][''])}, other values")
        if what:
            found.append(LayerChange(name, what))
    return found


def facts_of(left: Plan, right: Plan) -> dict[str, tuple[str, str]]:
    """Facts about the whole plans that differ."""
    sides = [
        {
            "model": plan.model_class,
            "backend": plan.backend,
            "timesteps": f"{len(plan.timesteps)}: "
            + ", ".join(f"{step:g}" for step in plan.timesteps[:8])
            + (", ..." if len(plan.timesteps) > 8 else ""),
            "observed step": str(plan.observed_step) + (f" and {plan.later_steps} later" if plan.later_steps else ""),
            "graphs": str(len(plan.calls)),
            "size": size(plan.bytes_after),
            "output SQNR": _mean(plan.output_sqnr_db.values()),
        }
        for plan in (left, right)
    ]
    return {key: (value, sides[1][key]) for key, value in sides[0].items() if value != sides[1][key]}


def _mean(values: Any) -> str:
    known = [value for value in values if math.isfinite(value)]
    return f"mean {sum(known) / len(known):.1f} dB" if known else "not measured"


def grouped(changes: Sequence[LayerChange]) -> list[list[str]]:
    """Rows of a table: layer, what, left and right. Layers that differ in the same way share rows."""
    groups: dict[tuple[Any, ...], list[LayerChange]] = {}
    for change in changes:
        alike = tuple(
            (key, *("" if key in _MEASURED else of_any_block(side) for side in pair))
            for key, pair in change.what.items()
        )
        groups.setdefault((pattern_of(change.name), alike), []).append(change)
    rows = []
    for members in groups.values():
        title = name_of_all([member.name for member in members])
        for key in members[0].what:
            sides = [list(dict.fromkeys(member.what[key][side] for member in members)) for side in (0, 1)]
            alone = len(members) == 1
            cells = [
                _together(texts) if key in _MEASURED else texts[0] if alone else of_any_block(texts[0])
                for texts in sides
            ]
            rows.append([title, key, *cells])
            title = ""
    return rows


def _together(texts: Sequence[str]) -> str:
    if len(texts) == 1:
        return texts[0]
    numbers = [float(part) for text in texts for part in text.partition(",")[0].split("..") if _is_number(part)]
    return f"{min(numbers):.4g}..{max(numbers):.4g}" if numbers else texts[0]


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _facts(plan: Plan, name: str) -> dict[str, str]:
    if name in plan.attentions:
        return _of_attention(plan.attentions[name])
    layer: LayerPlan = plan.layers[name]
    found: dict[str, str] = {"precision": str(layer.precision)}
    for key, value in (("reason", layer.reason), ("observed", layer.observed)):
        if value is not None:
            found[key] = value
    if layer.activation is not None:
        found |= {"range method": layer.activation.method, "range": _of_range(layer.activation)}
    if layer.timesteps is not None:
        found["timestep bins"] = ", ".join(f"{edge:g}" for edge in layer.boundaries) or "one"
    for key, entry in (("balance", layer.balance), ("shift", layer.shift)):
        if entry is not None:
            found |= _of_change(key, entry)
    for key, suffix in (("factors", ""), ("shifts", ".shift")):
        if f"{name}{suffix}" in plan.vectors:
            found[key] = _of_tensor(plan.vectors[f"{name}{suffix}"])
    for key, value_db in (("weight dB", layer.weight_sqnr_db), ("input dB", layer.activation_sqnr_db)):
        if value_db is not None:
            found[key] = span_of(iter([value_db]))
    return found


def _of_change(key: str, entry: Balance | Shift) -> dict[str, str]:
    found = {key: entry.cost if entry.cost == "not" else f"{entry.cost}, {entry.channels} channels"}
    if entry.into:
        found[f"{key} into"] = ", ".join(entry.into)
    if entry.reason is not None:
        found[f"{key} reason"] = entry.reason
    return found


def _of_attention(entry: AttentionPlan) -> dict[str, str]:
    found = {"precision": attention_bits(entry.bits, entry.softmax_bits)}
    if entry.reason is not None:
        found["reason"] = entry.reason
    found |= {side: _of_range(held) for side, held in entry.ranges.items()}
    return found | {f"{side} dB": span_of(iter([value])) for side, value in entry.sqnr_db.items()}


def _of_range(held: ActivationRange) -> str:
    lows, highs = held.ends
    bins = f", {len(lows)} bins" if len(lows) > 1 else ""
    return f"{min(lows):.4g}..{max(highs):.4g}{bins}"


def _of_tensor(vector: torch.Tensor) -> str:
    span = span_of_tensor(vector)
    return "empty" if span is None else f"{span[0]:.4g}..{span[1]:.4g}"
