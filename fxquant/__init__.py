"""fxquant: a graph-rewriting compiler over torch.fx for post-training quantization of diffusion transformers."""

from fxquant.api import QualityWarning, compile, trace
from fxquant.checkpoint import load, save
from fxquant.errors import FxquantError
from fxquant.plan import Plan
from fxquant.recipes import Recipe

__version__ = "0.1.0.dev0"

__all__ = ["FxquantError", "Plan", "QualityWarning", "Recipe", "compile", "load", "save", "trace"]
