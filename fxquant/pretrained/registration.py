"""Registers fxquant in the tables of diffusers, as soon as both are imported, in either order.

diffusers has no entry points for quantizers, and importing it takes seconds, so ``import fxquant`` does not do that.
It waits for the modules that hold the tables (:func:`watch`) instead. This module imports nothing but the standard
library.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_METHODS = ["save_pretrained", "from_pretrained"]


def _quantizers(tables: ModuleType) -> None:
    """Let ``from_pretrained`` of models find what reads and makes quantized models."""
    quantizer = importlib.import_module("fxquant.pretrained.quantizer")
    config = importlib.import_module("fxquant.pretrained.config")
    tables.AUTO_QUANTIZER_MAPPING["fxquant"] = quantizer.FxQuantizer
    tables.AUTO_QUANTIZATION_CONFIG_MAPPING["fxquant"] = config.FxQuantConfig


def _components(tables: ModuleType) -> None:
    """Let pipelines save quantized models, read them back, and take them where they expect a float model.

    Pipelines look for the base classes of their components by name, in the library that their index names: in fxquant
    for what a pipeline has saved itself, and otherwise in diffusers.
    """
    parts = importlib.import_module("fxquant.pretrained.parts")
    name = parts.PipelineModel.__name__
    tables.LOADABLE_CLASSES["fxquant"] = {name: _METHODS}
    tables.ALL_IMPORTABLE_CLASSES[name] = _METHODS
    setattr(importlib.import_module("diffusers"), name, parts.PipelineModel)
    parts.drop_warnings_about_types()


def _pipelines(module: ModuleType) -> None:
    """Let ``pipe.to`` ask quantized parts first, because it moves one part after another."""
    parts = importlib.import_module("fxquant.pretrained.parts")
    module.DiffusionPipeline.to = parts.asking_first(module.DiffusionPipeline.to)


_WATCHED: dict[str, Callable[[Any], None]] = {
    "diffusers.quantizers.auto": _quantizers,
    "diffusers.pipelines.pipeline_loading_utils": _components,
    "diffusers.pipelines.pipeline_utils": _pipelines,
}


def watch() -> None:
    """Register fxquant in the tables of modules that are imported already, and of others when they are imported."""
    for name, register in _WATCHED.items():
        if name in sys.modules:
            register(sys.modules[name])
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds the watched modules as usual, and registers fxquant after they have run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The usual spec of a watched module, with a loader that registers; None for other modules."""
        if fullname not in _WATCHED:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader, _WATCHED[fullname])
        return spec


class _Registering(Loader):
    """Loads a module as another loader does, then registers fxquant in it."""

    def __init__(self, loader: Loader, register: Callable[[ModuleType], None]) -> None:
        self.loader = loader
        self.register = register

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """The module, not yet run."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module and register."""
        self.loader.exec_module(module)
        self.register(module)

    def __getattr__(self, name: str) -> Any:
        """Sources for tracebacks, and whatever else is asked of the loader."""
        return getattr(self.loader, name)
