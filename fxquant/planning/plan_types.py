"""Types of the values of a plan. Any code may set them, and JSON does not tell a dict from a decision."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from fxquant.errors import CheckpointError, ConfigurationError
from fxquant.planning.decisions import ActivationRange, AttentionPlan, Balance, LayerPlan, Shift, TimestepGroups
from fxquant.planning.pass_decisions import PassDecisions, is_of_pass

if TYPE_CHECKING:
    from fxquant.planning.plan import Plan

T = TypeVar("T")

_ENTRIES: Mapping[str, type] = {
    **{"layers": dict, "attentions": dict, "products": dict, "vectors": dict},
    **{"calls": list, "pass_decisions": PassDecisions},
}
_HELD: Mapping[str, type] = {"layers": LayerPlan, "attentions": AttentionPlan, "products": str, "vectors": Tensor}
_PARTS = {"activation": ActivationRange, "balance": Balance, "shift": Shift, "timesteps": TimestepGroups}


def check_types(plan: Plan) -> None:
    """Refuse entries that are not of their class. Values within them are compared with the schema.

    Raises:
        ConfigurationError: Names the first of them.
    """
    for found in (_entries(plan), _parts(plan)):
        for place, value, kind in found:
            if not isinstance(value, kind):
                article = "an" if kind.__name__[0] in "AEIOU" else "a"
                raise ConfigurationError(
                    f"the plan is not valid at {place}: it should be {article} {kind.__name__}, not a "
                    f"{type(value).__name__}"
                )


def check_vectors(vectors: Mapping[str, Tensor]) -> None:
    """Compare vectors of layers with what a file may hold.

    Raises:
        CheckpointError: If the name of one is not that of a layer, or it holds NaN or infinity.
    """
    for name, vector in vectors.items():
        if not isinstance(name, str) or is_of_pass(name):
            raise CheckpointError(f"vector {name!r} should have the name of a layer")
        if not vector.is_floating_point() or not vector.isfinite().all():
            raise CheckpointError(f"vector {name!r} should hold finite numbers")


def check_json(data: Any, place: str = "") -> None:
    """Refuse values that JSON does not have. The schema takes some of them for numbers, such as tensors of one number.

    Raises:
        ConfigurationError: Names the first of them.
    """
    if not place:
        try:
            json.dumps(data)
            return
        except (TypeError, ValueError):
            pass  # Found below.
    if isinstance(data, (dict, list, tuple)):
        for name, value in data.items() if isinstance(data, dict) else enumerate(data):
            check_json(value, f"{place} > {name!r}" if place else repr(name))
    elif not isinstance(data, (str, int, float, type(None))):
        raise ConfigurationError(f"the plan is not valid at {place}: a {type(data).__name__} cannot be written as JSON")


def changed(now: Mapping[str, T], before: Mapping[str, T]) -> dict[str, T]:
    """The entries that were not there before, or were others."""
    return {name: value for name, value in now.items() if name not in before or not _is_equal(value, before[name])}


def _is_equal(one: object, other: object) -> bool:
    try:
        return bool(one == other)
    except (RuntimeError, TypeError, ValueError):  # Tensors and arrays, which have no place in them.
        return False


def _entries(plan: Plan) -> Iterator[tuple[str, Any, type]]:
    for entry, kind in _ENTRIES.items():
        yield repr(entry), getattr(plan, entry), kind
    for entry, kind in _HELD.items():
        for name, value in getattr(plan, entry).items():
            yield f"{entry!r} > {name!r}", value, kind


def _parts(plan: Plan) -> Iterator[tuple[str, Any, type]]:
    for name, layer in plan.layers.items():
        for part, kind in _PARTS.items():
            if getattr(layer, part) is not None:
                yield f"'layers' > {name!r} > {part!r}", getattr(layer, part), kind
    for name, attention in plan.attentions.items():
        yield f"'attentions' > {name!r} > 'ranges'", attention.ranges, dict
        for side, value in attention.ranges.items():
            yield f"'attentions' > {name!r} > 'ranges' > {side!r}", value, ActivationRange
