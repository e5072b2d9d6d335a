"""How much memory the passes need for one layer at a time, while all other tensors lie in files."""

from __future__ import annotations

from collections.abc import Collection

from fxquant.memory.bound import current
from fxquant.planning.decisions import LayerPlan
from fxquant.planning.plan import Plan

_FOLDED = 28
"""Bytes per element of a weight while a factor is folded into it: copies in its dtype and in float64."""
_ROUNDED = 17
"""Bytes per element while it is rounded: copies in float32, codes, and errors."""
_FACTORIZED = 13
"""Bytes per pair of input channels while second moments are factorized, in float64 and in float32."""
_FACTOR = 4
"""Bytes per pair of input channels of the factor."""


def working_set(layer: LayerPlan, moments: bool) -> int:
    """Bytes that folding into a layer and rounding it need at a time.

    Args:
        layer: The layer, with the shape of its weight.
        moments: Whether it is rounded by second moments of its input.
    """
    size, inputs = 1, layer.shape[1]
    for length in layer.shape:
        size *= length
    found = _FOLDED * size
    return max(found, _FACTORIZED * inputs**2, _FACTOR * inputs**2 + _ROUNDED * size) if moments else found


def largest_working_set(plan: Plan, moments: Collection[str]) -> tuple[str, int]:
    """The quantized layer that needs the most memory, and how many bytes; no layer and 0 if none is quantized.

    Args:
        plan: The plan.
        moments: The layers that are rounded by second moments.
    """
    sizes = {name: working_set(layer, name in moments) for name, layer in plan.quantized()}
    name = max(sizes, key=lambda name: sizes[name], default="")
    return name, sizes.get(name, 0)


def require_largest(plan: Plan, moments: Collection[str]) -> None:
    """Refuse a bound of the memory that is too small for the largest layer; see :func:`largest_working_set`.

    Raises:
        MemoryLimitError: Names the layer, and the smallest bound that would do.
    """
    bound, (name, size) = current(), largest_working_set(plan, moments)
    if bound is not None and name:
        bound.require(size, f"layer {name}")
