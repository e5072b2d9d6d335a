"""Tells which recipes decide from the weights alone, and which need statistics of activations."""

from __future__ import annotations

import re
from typing import Any

from fxquant.pipeline.recipes import DYNAMIC, Recipe
from fxquant.planning.precision import Precision

_FROM_WEIGHTS = ("remove-no-ops", "assign-precision", "quantize-linears", "quantize-embeddings")
_OF_PRODUCTS = ("quantize-convolutions", "quantize-attention")  # Their inputs always have static ranges.


def why_calibrated(recipe: Recipe) -> str | None:
    """Why a recipe needs statistics of activations, or None if it decides from the weights alone."""
    steps: dict[str, Any] = {step.name: step for step in (*recipe.prepare, *recipe.convert)}
    other = next((name for name in steps if name not in _FROM_WEIGHTS + _OF_PRODUCTS), None)
    if other is not None:
        return f"its pass {other} decides from activations"
    linears, assigned = steps.get("quantize-linears"), steps.get("assign-precision")
    if linears is None or assigned is None:
        return None
    if linears.rounding.value != "nearest":
        return f"{linears.rounding.value} rounds weights by their inputs"
    if linears.weight_range.value != "minmax":
        return f"the {linears.weight_range.value} search weighs errors of weights by their inputs"
    precisions = [assigned.precision, *re.findall(r"=([^;]+)", assigned.overrides)]
    if all(Precision.parse(text).activation_bits is None for text in precisions):
        return None
    if linears.activation_range.value != DYNAMIC:
        return "the ranges of its activations are static"
    if assigned.layers == "all" or assigned.overrides:
        return "the activations of convolutions and attention have static ranges"
    return None
