"""Recipes with the passes of this package: ``low-rank-w4a4`` and ``mixed-w8a8``."""

from __future__ import annotations

from dataclasses import replace

from example_passes.choose_bits import ChooseBits
from example_passes.low_rank_branch import LowRankBranch

from fxquant.authoring import Pass, Precision, Recipe, make_recipe


def low_rank(precision: Precision, layers: str) -> Recipe:
    """PTQ4DiT with float branches of rank 16 beside the quantized linears."""
    return _before_rounding(make_recipe(f"ptq4dit-{precision}", layers), LowRankBranch())


def mixed(precision: Precision, layers: str) -> Recipe:
    """PTQ4DiT with 4, 6 or 8 weight bits per linear; the precision's weight bits are the mean."""
    bits = precision.weight_bits
    return _before_rounding(make_recipe(f"ptq4dit-{precision}", layers), ChooseBits(mean=float(bits or 0)))


def _before_rounding(recipe: Recipe, step: Pass) -> Recipe:
    place = [each.name for each in recipe.convert].index("quantize-linears")
    return replace(recipe, convert=(*recipe.convert[:place], step, *recipe.convert[place:]))
