"""Read packages: quantized models compiled ahead of time, which load in a second and run without tracing.

A package is a folder. ``package.json`` describes the calls of the model and holds the digests of all files.
``config.json`` is the config of the model. ``model.safetensors`` holds the tensors, once for all graphs. Each
``graph-<n>.pt2`` is the machine code of one graph, which takes the tensors as inputs. The code runs on loading, in this
process. **A package is a program: load only packages from people you trust.** Digests detect damage; they are not a
signature.
"""

from __future__ import annotations

import importlib
import json
import platform
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxquant.capture.calls import CallSpec
from fxquant.disk.files import (
    blaming,
    check_digests,
    digest_of,
    is_text_of,
    load_tensors,
    refuse_to_replace,
)
from fxquant.disk.folders import mention_leftovers, no_folder
from fxquant.errors import CheckpointError
from fxquant.pipeline.backend import resolve_backend
from fxquant.runtime import torch_compile  # noqa: F401  (registers an op)
from fxquant.schemas.common import check, read_json
from fxquant.schemas.config import Config
from fxquant.schemas.package import PackageFile
from fxquant.storage.agreement import Header, check_config, check_finite, read_headers
from fxquant.storage.aot.model import CONFIG_FILE, PACKAGE_FILE, PackagedGraph, PackagedModel

FORMAT = 1
TENSORS_FILE = "model.safetensors"
GRAPH_FILE = "graph-{}.pt2"


def load_package(folder: str | Path) -> PackagedModel:
    """Read a package. It is a program, which runs on loading: load only packages from people you trust.

    Args:
        folder: What :func:`fxquant.export_aot` wrote.

    Returns:
        The model, to put in the pipeline in place of the original.

    Raises:
        CheckpointError: If a file is missing, damaged or of a newer format, the package was compiled for another torch,
            system or processor, or the backend that made it is not installed.
        BackendError: If the backend holds its tensors in another form on this machine.
    """
    folder = Path(folder)
    info = _read_info(folder)
    path = folder / PACKAGE_FILE
    _check_machine(info["machine"], path)
    with blaming(path):
        runner = resolve_backend(info["backend"])  # Registers its ops.
        runner.make_ready(info["ops"])
    packed = set(info["packed"])
    names = sorted({*info["files"], CONFIG_FILE, TENSORS_FILE, *map(GRAPH_FILE.format, range(len(info["graphs"])))})

    def take(name: str, tensor: Tensor) -> Tensor:
        return runner.from_plain(tensor) if name in packed else tensor.clone()

    with ThreadPoolExecutor(1) as pool:
        checked = pool.submit(check_digests, folder, names, info["files"], PACKAGE_FILE)
        try:  # Tensors hold no code; files with code are read only after the check.
            tensors = load_tensors(folder / TENSORS_FILE, torch.device("cpu"), take)
        finally:
            checked.result()
    headers = read_headers(folder / TENSORS_FILE)
    with blaming(folder / TENSORS_FILE):
        _check_tensors(headers, info.get("tensors"))
        check_finite(tensors, info.get("infinite"))
    _, config = read_json(folder / CONFIG_FILE, "package")
    with blaming(folder / CONFIG_FILE):
        check(Config, config, "the config")
        check_config(config, headers)
    with blaming(path):
        _import_output_class(info)
        graphs = [_read_graph(folder, number, entry, tensors) for number, entry in enumerate(info["graphs"])]
        return PackagedModel(info, config, graphs, headers)


def _check_tensors(headers: Mapping[str, Header], described: Mapping[str, str] | None) -> None:
    """Refuse tensors with other shapes or dtypes than compiled code expects, because that code checks neither."""
    found = {name: str(header) for name, header in headers.items()}
    for name in sorted(found.keys() | (described or {}).keys()):
        if described is not None and found.get(name) != described.get(name):
            there, wanted = found.get(name, "missing"), described.get(name, "none")
            raise CheckpointError(f"tensor {name!r} is {there}, but by {PACKAGE_FILE} it is {wanted}")


def _read_graph(folder: Path, number: int, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PackagedGraph:
    call = CallSpec.from_json(entry["call"])
    missing = [name for name in entry["tensors"] if name not in tensors]
    if missing:
        raise CheckpointError(f"graph {number} reads tensor {missing[0]!r}, which {TENSORS_FILE} does not hold")
    read = [tensors[name] for name in entry["tensors"]]
    return PackagedGraph(folder / GRAPH_FILE.format(number), call, pytree.treespec_loads(entry["output"]), read)


def is_package_file(path: Path) -> bool:
    """Whether a file may belong to a package, by its name."""
    fixed = (PACKAGE_FILE, CONFIG_FILE, TENSORS_FILE)
    return path.name in fixed or re.fullmatch(r"graph-\d+\.pt2", path.name) is not None


def refuse_existing(folder: Path, overwrite: bool) -> None:
    """Refuse to write a package over something that must stay.

    Raises:
        CheckpointError: If the path is a file, a folder that is not empty while ``overwrite`` is not given, or a folder
            that holds anything other than a package.
    """
    refuse_to_replace(folder, overwrite, is_package_file, PACKAGE_FILE)


def _read_info(folder: Path) -> dict[str, Any]:
    path = folder / PACKAGE_FILE
    if not folder.is_dir():
        raise no_folder(folder)
    mention_leftovers(folder)
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: {folder} is not an fxquant package, or not all of it was copied")
    text, info = read_json(path, "package")
    if not isinstance(info, dict) or "format" not in info:
        raise CheckpointError(f"{path} does not describe an fxquant package")
    if info["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {info['format']}; this fxquant reads {FORMAT}: export it again")
    if info.get("digest") != digest_of(info) or not is_text_of(text, info):
        raise CheckpointError(f"{path} does not match its digest: it is damaged or was edited; copy the package again")
    with blaming(path):
        check(PackageFile, info, "the description of the package")
    return info


def info_text(info: Mapping[str, Any]) -> str:
    """The content of a ``package.json``."""
    return json.dumps(info, indent=1) + "\n"


# --- the machine that a package was compiled for --------------------------------------------------------------------

_INSTRUCTIONS = ("avx2", "avx512", "vnni", "avx512_bf16", "amx_tile")


def machine() -> dict[str, Any]:
    """What compiled code depends on: the torch version, the system, the architecture and the processor instructions."""
    found = [name for name in _INSTRUCTIONS if getattr(torch.cpu, f"_is_{name}_supported", lambda: False)()]
    return {"torch": torch.__version__, "system": platform.system(), "processor": platform.machine(), "has": found}


def _check_machine(made_for: Any, path: Path) -> None:
    here = machine()
    with blaming(path):
        for key, what in (("torch", "torch"), ("system", "system"), ("processor", "processor")):
            if made_for[key] != here[key]:
                raise CheckpointError(
                    f"the package was compiled for {what} {made_for[key]}, but this is {here[key]}; export it here"
                )
        missing = [name for name in made_for["has"] if name not in here["has"]]
        if missing:
            raise CheckpointError(
                f"the package was compiled for a processor with {', '.join(missing)}, which this one lacks; export it "
                "on this machine"
            )


# --- output ---------------------------------------------------------------------------------------------------------


def _import_output_class(info: Mapping[str, Any]) -> None:
    """Import the module that registers the output class with pytree, only if it belongs to diffusers."""
    for entry in info["graphs"]:
        module = str(entry.get("output_module") or "")
        if module.partition(".")[0] == "diffusers":
            importlib.import_module(module)
