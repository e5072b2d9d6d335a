"""Compile a quantized model ahead of time, with AOTInductor, into a package (:mod:`fxquant.storage.aot.package`).

The tensors of a graph become inputs of its machine code. So the graphs share their tensors, and one file stores them
in a format that holds no code. A backend may also hold tensors in layouts of kernels. No file stores such layouts: they
are made on loading.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from fxquant.capture.calls import BATCH, TRACED_BATCH
from fxquant.capture.exporting import export
from fxquant.capture.graph import CapturedGraph
from fxquant.capture.rebuilding import config_text
from fxquant.capture.threads import tracing_alone, without_autocast
from fxquant.disk.files import digest, digest_of, dtype_name, write_tensors
from fxquant.disk.folders import prepare, whole_folder
from fxquant.errors import BackendError, CheckpointError, CompilerError, ConfigurationError
from fxquant.ir.tensors import read_tensors
from fxquant.pipeline.backend import Backend, resolve_backend
from fxquant.planning.plan import PLAN_FILE
from fxquant.runtime import torch_compile
from fxquant.runtime.float_model import class_path
from fxquant.runtime.given import quantized_model
from fxquant.runtime.lora import refuse_loaded
from fxquant.runtime.model import GraphModel
from fxquant.storage import pipeline_folders
from fxquant.storage.agreement import check_finite, infinite_in, read_headers
from fxquant.storage.aot import package
from fxquant.storage.aot.model import CONFIG_FILE, PACKAGE_FILE, signature_to_json
from fxquant.storage.aot.package import FORMAT, GRAPH_FILE, TENSORS_FILE, info_text, machine
from fxquant.storage.card import is_own_card
from fxquant.storage.checkpoint import load
from fxquant.storage.pipeline_folders import INDEX_FILE, parts_of, refuse_input

Progress = Callable[[int, int, float | None], None]
_OPTIONS = {"cpp.dynamic_threads": True}  # Use the number of threads at run time, not at compile time.


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes:
        folder: The folder that was written.
        seconds: Compilation time of each graph, in seconds.
        bytes: Size of the written files, in bytes.
    """

    folder: Path
    seconds: tuple[float, ...]
    bytes: int


def export_aot(
    model: nn.Module,
    folder: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress = lambda *_: None,
) -> Exported:
    """Compile a quantized model ahead of time into a package, which :func:`fxquant.load_package` reads.

    The package has a graph for every kind of call that the model has seen. It needs the torch version, the operating
    system and the processor that it was compiled for. Exporting needs a C++ compiler; loading does not.

    Args:
        model: What :func:`fxquant.compile` or :func:`fxquant.load` returned, on the CPU.
        folder: The folder to write; it is created, with its parents.
        overwrite: Replace a package that is already there. Folders with anything else in them are never replaced.
        progress: Called twice per graph, with the number of the graph, the number of graphs, and a third argument: None
            before its compilation, and the compilation time in seconds after it.

    Raises:
        ConfigurationError: If the model is not quantized, or its output is of a class that cannot be named in a file.
        AdapterError: If LoRAs are loaded.
        BackendError: If the model is not on the CPU, or its backend holds tensors that cannot be written.
        CompilerError: If there is no C++ compiler, or it fails.
        CheckpointError: If the folder exists and ``overwrite`` is not given, or holds other files.
    """
    model, plan = quantized_model(model, "export_aot")
    refuse_loaded(model, "a package")
    folder = Path(folder).resolve()
    if model.device.type != "cpu":
        raise BackendError(f"packages run on the CPU, but this model is on {model.device}; move it: model.to('cpu')")
    require_compiler()
    runner = model.backend or resolve_backend(plan.backend)
    seconds = []
    with whole_folder(folder, lambda path: package.refuse_existing(path, overwrite)) as written:
        entries = []
        for number, captured in enumerate(model.captured):
            entries.append(_describe(captured))
            progress(number, len(model.captured), None)
            began = time.perf_counter()
            compile_graph(captured, written / GRAPH_FILE.format(number))
            seconds.append(time.perf_counter() - began)
            progress(number, len(model.captured), seconds[-1])
        _write_rest(model, runner, entries, written)
        size = sum(path.stat().st_size for path in written.iterdir())
    return Exported(folder, tuple(seconds), size)


def export_folder(
    source: str | Path,
    folder: str | Path,
    *,
    backend: str | None = None,
    overwrite: bool = False,
    progress: Progress = lambda *_: None,
) -> Exported:
    """Export a checkpoint, or a pipeline that holds one. :func:`fxquant.load_pipeline` reads an exported pipeline.

    Args:
        source: A folder that :func:`fxquant.save` or :func:`fxquant.save_pipeline` wrote.
        folder: The folder to write: a package, or a copy of the pipeline with packages in place of checkpoints.
        backend: A backend other than the one that the model was compiled for.
        overwrite: Replace what is already there, if it is of the same kind.
        progress: As for :func:`export_aot`.

    Raises:
        CheckpointError: As for :func:`export_aot`; also if there is no quantized model in ``source``.
    """
    source, folder = Path(source).resolve(), Path(folder).resolve()
    refuse_input(folder, source)
    if folder.is_relative_to(source):
        raise ConfigurationError(f"{folder} is inside of the input {source}; choose a folder outside of it")
    require_compiler()
    if not (source / INDEX_FILE).is_file():
        prepare(folder, lambda path: package.refuse_existing(path, overwrite))
        return export_aot(load(source, backend=backend), folder, overwrite=overwrite, progress=progress)
    parts = [name for name in parts_of(source) if (source / name / PLAN_FILE).is_file()]
    if not parts and any((source / name / PACKAGE_FILE).is_file() for name in parts_of(source)):
        raise CheckpointError(f"{source} holds a package, which is already compiled; give what it was exported from")
    if not parts:
        raise CheckpointError(f"no part of the pipeline {source} is quantized; see fxquant quantize")
    seconds: list[float] = []
    with whole_folder(folder, lambda path: pipeline_folders.refuse_existing(path, overwrite)) as written:
        for path in source.iterdir():
            if is_own_card(path):
                continue  # It says how to read checkpoints.
            if path.is_file():
                shutil.copy(path, written)
            elif path.name not in parts:
                shutil.copytree(path, written / path.name)
        for part in parts:
            model = load(source / part, backend=backend)
            seconds += export_aot(model, written / part, progress=progress).seconds
        size = sum(path.stat().st_size for path in written.rglob("*") if path.is_file())
    return Exported(folder, tuple(seconds), size)


def require_compiler() -> None:
    """Raise if inductor finds no C++ compiler on this machine.

    Raises:
        CompilerError: Says what to install.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError) as error:
        raise CompilerError(
            "compiling ahead of time needs a C++ compiler, but none was found: install g++ 10 or newer (on Debian and "
            "Ubuntu the package g++) or clang, or name a compiler in the environment variable CXX"
        ) from error


def compile_graph(captured: CapturedGraph, path: Path) -> None:
    """Compile one graph. Its tensors become further inputs, in the order of :func:`~fxquant.ir.tensors.read_tensors`.

    Raises:
        CompilerError: If the compiler fails.
    """
    module = lifted(captured.module)
    arguments, shapes = _arguments(captured)
    try:
        with torch.no_grad(), tracing_alone(), without_autocast():
            program = export(module, arguments, {}, shapes)
            torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=dict(_OPTIONS))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CompilerError(
            f"the graph for calls {captured.call} cannot be compiled ahead of time: {reason}"
        ) from error


def lifted(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph that takes its tensors as inputs, after the other inputs."""
    graph = copy.deepcopy(module.graph)
    torch_compile.keep_layouts(graph)
    places: dict[str, fx.Node] = {}
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        target = str(node.target)
        if target not in places:
            with graph.inserting_after(last):
                last = places[target] = graph.placeholder(f"tensor_{len(places)}")
            last.meta = dict(node.meta)
        node.replace_all_uses_with(places[target])
        graph.erase_node(node)
    graph.lint()
    return fx.GraphModule(nn.Module(), graph, class_name=type(module).__name__)


def _arguments(captured: CapturedGraph) -> tuple[tuple[Tensor, ...], tuple[dict[int, Any] | None, ...]]:
    """The inputs to compile a lifted graph with, and which of their dimensions are open."""
    inputs, shapes = [], []
    for _, spec in captured.call.tensors:
        inputs.append(torch.zeros(spec.concrete(TRACED_BATCH), dtype=spec.dtype))
        shapes.append({dim: Dim.DYNAMIC for dim, size in enumerate(spec.shape) if size == BATCH} or None)
    for tensor in read_tensors(captured.module).values():
        # While they are traced, ops that read a layout of a kernel need only its shape. Machine code is made for the
        # strides of its inputs, and the file from which the package reads them stores contiguous tensors.
        plain = tensor.layout is torch.strided
        inputs.append(tensor.detach().contiguous() if plain else torch.empty(tensor.shape, dtype=tensor.dtype))
        shapes.append(None)
    return tuple(inputs), tuple(shapes)


def _describe(captured: CapturedGraph) -> dict[str, Any]:
    """What ``package.json`` says about a graph."""
    kind = captured.out_spec.type
    try:
        output = pytree.treespec_dumps(captured.out_spec)
    except Exception as error:
        raise ConfigurationError(
            f"the model returns a {getattr(kind, '__name__', kind)}, which cannot be named in a file ({error}); let it "
            "return tensors, tuples, dicts or an output class of diffusers"
        ) from error
    return {
        "call": captured.call.to_json(),
        "output": output,
        "output_module": getattr(kind, "__module__", None),
        "tensors": list(read_tensors(captured.module)),
    }


def _own_ops(model: GraphModel) -> list[str]:
    """The ops of the graphs that are not torch's own, by name."""
    schemas = {
        str(node.target._schema.name)
        for captured in model.captured
        for node in captured.module.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
    }
    return sorted(name for name in schemas if name.startswith("fxquant"))


def _write_rest(model: GraphModel, runner: Backend, entries: list[dict[str, Any]], folder: Path) -> None:
    assert model.plan is not None
    (folder / CONFIG_FILE).write_text(config_text(model.architecture.skeleton), encoding="utf-8")
    tensors = model.tensors()
    plain = {name: runner.to_plain(tensor) for name, tensor in tensors.items()}
    check_finite(plain, None)  # Loading would refuse NaN.
    write_tensors(plain, folder / TENSORS_FILE)
    info: dict[str, Any] = {
        "format": FORMAT,
        "machine": machine(),
        "model_class": class_path(model.architecture.skeleton),
        "recipe": model.plan.recipe,
        "backend": runner.name,
        "dtype": dtype_name(model.dtype),
        "timestep": model.architecture.timestep,
        "signature": signature_to_json(model.architecture.signature),
        "packed": [name for name, tensor in tensors.items() if tensor.layout is not torch.strided],
        "infinite": infinite_in(plain),
        "tensors": {name: str(header) for name, header in read_headers(folder / TENSORS_FILE).items()},
        "graphs": entries,
        "ops": _own_ops(model),
    }
    info["files"] = {path.name: digest(path) for path in sorted(folder.iterdir())}
    info["digest"] = digest_of(info)
    (folder / PACKAGE_FILE).write_text(info_text(info), encoding="utf-8")
