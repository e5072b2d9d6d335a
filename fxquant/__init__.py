"""fxquant: a graph-rewriting compiler over torch.fx for post-training quantization of diffusion transformers."""

import importlib
from typing import TYPE_CHECKING, Any

from fxquant.pretrained.registration import watch

if TYPE_CHECKING:
    from fxquant.allocation.measure import sensitivity
    from fxquant.allocation.result import SearchResult
    from fxquant.allocation.search import search
    from fxquant.api import compile, trace
    from fxquant.errors import FxquantError, QualityWarning, SpeedWarning
    from fxquant.evaluation.evaluate import evaluate
    from fxquant.evaluation.result import Evaluation
    from fxquant.export.balance import balance
    from fxquant.export.balance_pipeline import balance_pipeline
    from fxquant.export.comfyui import export_comfyui
    from fxquant.export.compressed_tensors import export_compressed_tensors
    from fxquant.export.int8 import export_int8
    from fxquant.export.modelopt import export_modelopt
    from fxquant.export.onnx import export_onnx
    from fxquant.export.openvino import export_openvino
    from fxquant.inspect.difference import Difference, diff
    from fxquant.inspect.errors import attribute
    from fxquant.inspect.explain import Explanation, explain
    from fxquant.inspect.history import History, rewrite_history
    from fxquant.inspect.page.write import inspect_page
    from fxquant.inspect.profiling import Profile, profile
    from fxquant.inspect.report import Report, report
    from fxquant.ir.origins import origin
    from fxquant.ir.roles import nodes_of
    from fxquant.memory.bound import limit_memory
    from fxquant.parallel.parallelize import parallelize
    from fxquant.parallel.plan import TensorParallelPlan, tensor_parallel_plan
    from fxquant.pipeline.recipes import Recipe, make_recipe
    from fxquant.planning.attribution import Attribution
    from fxquant.planning.layer_times import LayerTimes
    from fxquant.planning.plan import Plan
    from fxquant.planning.sensitivities import Sensitivities
    from fxquant.pretrained.components import compile_pipeline
    from fxquant.pretrained.config import FxQuantConfig
    from fxquant.pretrained.entries import compile_parts
    from fxquant.statistics.collection import Statistics
    from fxquant.storage.aot.export import export_aot
    from fxquant.storage.aot.package import load_package
    from fxquant.storage.checkpoint import load, save
    from fxquant.storage.diffusers_io import load_pipeline, save_pipeline

__version__ = "0.1.0.dev0"

__all__ = [
    "Attribution",
    "Difference",
    "Evaluation",
    "Explanation",
    "FxQuantConfig",
    "FxquantError",
    "History",
    "LayerTimes",
    "Plan",
    "Profile",
    "QualityWarning",
    "Recipe",
    "Report",
    "SearchResult",
    "Sensitivities",
    "SpeedWarning",
    "Statistics",
    "TensorParallelPlan",
    "attribute",
    "balance",
    "balance_pipeline",
    "compile",
    "compile_parts",
    "compile_pipeline",
    "diff",
    "evaluate",
    "explain",
    "export_aot",
    "export_comfyui",
    "export_compressed_tensors",
    "export_int8",
    "export_modelopt",
    "export_onnx",
    "export_openvino",
    "inspect_page",
    "limit_memory",
    "load",
    "load_package",
    "load_pipeline",
    "make_recipe",
    "nodes_of",
    "origin",
    "parallelize",
    "profile",
    "report",
    "rewrite_history",
    "save",
    "save_pipeline",
    "search",
    "sensitivity",
    "tensor_parallel_plan",
    "trace",
]

# Names are imported on first access, so that `fxquant --help` does not wait for torch. The index of a pipeline names
# GraphModel, PackagedModel and PipelineModel.
_HOMES = {
    "Difference": "inspect.difference",
    "Evaluation": "evaluation.result",
    "Explanation": "inspect.explain",
    "Attribution": "planning.attribution",
    "FxQuantConfig": "pretrained.config",
    "FxquantError": "errors",
    "GraphModel": "runtime.model",
    "History": "inspect.history",
    "LayerTimes": "planning.layer_times",
    "PackagedModel": "storage.aot.model",
    "PipelineModel": "pretrained.parts",
    "Plan": "planning.plan",
    "Profile": "inspect.profiling",
    "QualityWarning": "errors",
    "Recipe": "pipeline.recipes",
    "Report": "inspect.report",
    "SearchResult": "allocation.result",
    "Sensitivities": "planning.sensitivities",
    "SpeedWarning": "errors",
    "Statistics": "statistics.collection",
    "TensorParallelPlan": "parallel.plan",
    "attribute": "inspect.errors",
    "balance": "export.balance",
    "balance_pipeline": "export.balance_pipeline",
    "compile": "api",
    "compile_parts": "pretrained.entries",
    "compile_pipeline": "pretrained.components",
    "diff": "inspect.difference",
    "evaluate": "evaluation.evaluate",
    "explain": "inspect.explain",
    "export_aot": "storage.aot.export",
    "export_comfyui": "export.comfyui",
    "export_compressed_tensors": "export.compressed_tensors",
    "export_int8": "export.int8",
    "export_modelopt": "export.modelopt",
    "export_onnx": "export.onnx",
    "export_openvino": "export.openvino",
    "inspect_page": "inspect.page.write",
    "load": "storage.checkpoint",
    "load_package": "storage.aot.package",
    "limit_memory": "memory.bound",
    "load_pipeline": "storage.diffusers_io",
    "make_recipe": "pipeline.recipes",
    "nodes_of": "ir.roles",
    "origin": "ir.origins",
    "parallelize": "parallel.parallelize",
    "profile": "inspect.profiling",
    "report": "inspect.report",
    "rewrite_history": "inspect.history",
    "save": "storage.checkpoint",
    "save_pipeline": "storage.diffusers_io",
    "search": "allocation.search",
    "sensitivity": "allocation.measure",
    "tensor_parallel_plan": "parallel.plan",
    "trace": "api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


watch()
