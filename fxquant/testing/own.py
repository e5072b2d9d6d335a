"""Names of what fxquant itself registers, so that its tests run over its own passes, whatever else is installed."""

from __future__ import annotations

from fxquant.pipeline.backend import BACKENDS
from fxquant.pipeline.pipeline import PASSES
from fxquant.pipeline.recipes import RECIPES


def own_passes() -> list[str]:
    """Names of fxquant's own passes, sorted. Other packages are not imported."""
    return PASSES.own()


def own_recipes() -> list[str]:
    """Names of fxquant's own recipes, sorted."""
    return RECIPES.own()


def own_backends() -> list[str]:
    """Names of fxquant's own backends, sorted."""
    return BACKENDS.own()
