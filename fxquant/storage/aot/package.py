"""Packages: a quantized model compiled ahead of time, to load in a second and run without tracing anything.

A package is a folder: ``package.json`` says how the model is called and holds the digests of all files, ``config.json``
is the model's config, ``model.safetensors`` the tensors, once for all graphs, and each ``graph-<n>.pt2`` is the machine
code of one graph, to which the tensors are inputs. The code runs on loading, in this process: **a package is a program:
load only those from people you trust**. Digests find damage; they are no signature.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import platform
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from fxquant.capture.calls import CallSpec
from fxquant.capture.describe import canonical_call, describe_call
from fxquant.capture.trace import Architecture
from fxquant.disk.files import (
    blaming,
    check_digests,
    digest_of,
    dtype_of_name,
    is_text_of,
    load_tensors,
    refuse_to_replace,
)
from fxquant.disk.folders import mention_leftovers, no_folder
from fxquant.errors import CaptureError, CheckpointError, ConfigurationError
from fxquant.pipeline.backend import resolve_backend
from fxquant.runtime import torch_compile as _compiling  # noqa: F401  (registers an op)
from fxquant.runtime.drop_in import hand_on
from fxquant.runtime.model import let_pipelines_save
from fxquant.runtime.nans import with_nans
from fxquant.schemas.common import check, read_json
from fxquant.schemas.config import Config
from fxquant.schemas.package import PackageFile
from fxquant.storage.agreement import Header, bounded, check_config, check_finite, read_headers

FORMAT = 1
PACKAGE_FILE = "package.json"
CONFIG_FILE = "config.json"
TENSORS_FILE = "model.safetensors"
GRAPH_FILE = "graph-{}.pt2"


class PackagedGraph:
    """One compiled graph and its tensors.

    Attributes:
        call: The inputs that it serves.
        out_spec: Pytree structure of the model's output.
    """

    def __init__(self, path: Path, call: CallSpec, out_spec: pytree.TreeSpec, tensors: Sequence[Tensor]) -> None:
        self.call = call
        self.out_spec = out_spec
        self._tensors = tensors
        self._loader = torch._inductor.aoti_load_package(str(path)).loader
        wanted = pytree.treespec_loads(self._loader.get_call_spec()[0]).num_leaves
        if wanted != len(call.tensors) + len(tensors):
            raise CheckpointError(
                f"{path.name} has {wanted} inputs, and by {PACKAGE_FILE} {len(call.tensors)} and {len(tensors)} tensors"
            )

    @torch.no_grad()
    def __call__(self, leaves: Sequence[Any]) -> Any:
        """The model's output for the leaves of a call that fits."""
        # Compiled code reads memory as it lay when it was compiled: in order, with its signs.
        inputs = [tensor.resolve_conj().resolve_neg().contiguous() for tensor in self.call.inputs(leaves)]
        found = self._loader.boxed_run([*inputs, *self._tensors])
        return pytree.tree_unflatten(with_nans(self.call, inputs, found), self.out_spec)


class PackagedModel(nn.Module):
    """A packaged model; pipelines take it in place of the original.

    It has the ``config``, ``dtype``, ``device``, ``forward`` signature and output class of the original. Other
    attributes are those of a weightless original, which is built when one is first asked for.

    Attributes:
        calls: What was packaged: the inputs of each graph.
        info: The content of ``package.json``.
    """

    def __init__(
        self,
        info: Mapping[str, Any],
        config: Mapping[str, Any],
        graphs: Sequence[PackagedGraph],
        headers: Mapping[str, Header],
    ) -> None:
        super().__init__()
        self.info = info
        self._config = config
        self._headers = headers
        self._graphs = list(graphs)
        self._signature = signature_from_json(info["signature"])
        self.forward = functools.partial(_forward, self)
        self.forward.__signature__ = self._signature  # type: ignore[attr-defined]
        self.eval()
        let_pipelines_save(type(self))

    @property
    def calls(self) -> list[CallSpec]:
        """The inputs of each graph."""
        return [graph.call for graph in self._graphs]

    @property
    def config(self) -> Any:
        """The original model's config."""
        return _frozen(self._config)

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point dtype of the original model."""
        return dtype_of_name(self.info["dtype"])

    @property
    def device(self) -> torch.device:
        """Where it was compiled for."""
        return torch.device("cpu")

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """Refuse: what a package was made from is not in it.

        Raises:
            ConfigurationError: Says what to do instead.
        """
        raise ConfigurationError("a packaged model is not saved but copied: copy its folder, or export a checkpoint")

    def skeleton(self) -> nn.Module:
        """The original model without its weights, if its class is one of diffusers.

        Raises:
            AttributeError: If it is not.
            CheckpointError: If its class cannot be built with the config.
        """
        if "_skeleton" not in self.__dict__:
            module, _, name = str(self.info["model_class"]).partition(":")
            cls = getattr(importlib.import_module("diffusers"), name, None) if module == "diffusers" else None
            if cls is None:
                raise AttributeError(f"the packaged model is a {name} from {module}, of which only calls are packaged")
            with blaming(Path(CONFIG_FILE)), bounded(self._headers):
                made = Architecture.from_config(cls, self._config, self.info["timestep"]).skeleton
            self.__dict__["_skeleton"] = made  # Not a submodule: its parameters are fake.
        skeleton: nn.Module = self.__dict__["_skeleton"]
        return skeleton

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):
                raise
            return hand_on(self.skeleton(), name, self)

    def train(self, mode: bool = True) -> PackagedModel:
        """Refuse the training mode, as what was packaged does.

        Raises:
            ConfigurationError: If ``mode`` is true.
        """
        if mode:
            raise ConfigurationError("a packaged model has no training mode. Train the float model and compile that")
        super().train(False)
        return self

    def _save_to_state_dict(self, *_: Any, **__: Any) -> None:
        raise ConfigurationError(
            "a packaged model has no state dict: its tensors are inputs of machine code. Copy its folder, or take the "
            "state dict of the checkpoint that it was exported from"
        )

    def __copy__(self) -> PackagedModel:
        return PackagedModel(self.info, self._config, self._graphs, self._headers)

    def __deepcopy__(self, memo: Any) -> PackagedModel:
        return self.__copy__()  # Nothing of it ever changes, so the copy runs the same machine code.

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ConfigurationError(
            "a packaged model cannot be pickled, nor written by torch.save, for it is machine code. Copy its folder "
            "and read the copy with fxquant.load_package(folder)"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> PackagedModel:
        probe = fn(torch.empty(0, dtype=self.dtype))
        if probe.dtype != self.dtype or probe.device != self.device:
            raise ConfigurationError(
                f"a packaged model runs in {self.dtype} on {self.device}, for which it was compiled, not in "
                f"{probe.dtype} on {probe.device}; load a checkpoint for that, or export another package"
            )
        return self


@torch.compiler.disable
def _forward(self: PackagedModel, *args: Any, **kwargs: Any) -> Any:
    names, leaves, structure = canonical_call(self._signature, args, kwargs, self.info["timestep"])
    for graph in self._graphs:
        if graph.call.fits(names, leaves, structure):
            _refuse_unreadable(names, leaves)
            return graph(leaves)
    packaged = "".join(f"\n  {call}" for call in self.calls)
    here = describe_call(names, leaves, structure)
    here = here.at_batch(here.batch_size(leaves), None)
    raise CaptureError(
        f"this call fits no graph of the package: {here}\nPackaged are{packaged}\n"
        "Make a call like this one while you calibrate, or with the quantized model before you export it."
    )


def _refuse_unreadable(names: Sequence[str], leaves: Sequence[Any]) -> None:
    """Refuse tensors whose memory compiled code cannot read, and that it would read all the same.

    Raises:
        ConfigurationError: Names the input.
    """
    for name, leaf in zip(names, leaves, strict=True):
        if not isinstance(leaf, Tensor):
            continue
        fake, plain = isinstance(leaf, FakeTensor), leaf.layout is torch.strided
        if leaf.device.type != "cpu" or fake or not plain:
            found = f"on {leaf.device}" if leaf.device.type != "cpu" else "fake" if fake else str(leaf.layout)
            raise ConfigurationError(
                f"input {name!r} is {found}; a packaged model reads dense tensors on the CPU. Move it there, or "
                "use the checkpoint that it was exported from"
            )


def load_package(folder: str | Path) -> PackagedModel:
    """Read a package. What it holds is a program, which runs: read only packages from people you trust.

    Args:
        folder: What :func:`fxquant.export_aot` wrote.

    Returns:
        The model, to put in the pipeline in place of the original.

    Raises:
        CheckpointError: If a file is missing, damaged or of a newer format, the package was compiled for another torch
            or processor, or the backend that it was made by is not installed.
        BackendError: If the backend holds its tensors in another way on this machine.
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
        try:  # Tensors do nothing; what does something is touched only after the check.
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
    """Refuse tensors that are not as compiled code, which looks at neither shapes nor dtypes, takes them to be."""
    found = {name: str(header) for name, header in headers.items()}
    for name in sorted(found.keys() | (described or {}).keys()):
        if described is not None and found.get(name) != described.get(name):
            there, wanted = found.get(name, "missing"), described.get(name, "none")
            raise CheckpointError(f"tensor {name!r} is {there}, and by {PACKAGE_FILE} it is {wanted}")


def _read_graph(folder: Path, number: int, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PackagedGraph:
    call = CallSpec.from_json(entry["call"])
    missing = [name for name in entry["tensors"] if name not in tensors]
    if missing:
        raise CheckpointError(f"graph {number} reads tensor {missing[0]!r}, which {TENSORS_FILE} does not hold")
    read = [tensors[name] for name in entry["tensors"]]
    return PackagedGraph(folder / GRAPH_FILE.format(number), call, pytree.treespec_loads(entry["output"]), read)


def is_package_file(name: str) -> bool:
    """Whether a file of this name may be a part of a package."""
    return name in (PACKAGE_FILE, CONFIG_FILE, TENSORS_FILE) or re.fullmatch(r"graph-\d+\.pt2", name) is not None


def refuse_existing(folder: Path, overwrite: bool) -> None:
    """Refuse to write a package where something is that must stay.

    Raises:
        CheckpointError: If it is a file, a folder that is not empty while ``overwrite`` is not given, or one that
            holds anything but a package.
    """
    refuse_to_replace(folder, overwrite, is_package_file, PACKAGE_FILE)


def _read_info(folder: Path) -> dict[str, Any]:
    path = folder / PACKAGE_FILE
    if not folder.is_dir():
        raise no_folder(folder)
    mention_leftovers(folder)
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: {folder} is no fxquant package, or not all of it was copied")
    text, info = read_json(path, "package")
    if not isinstance(info, dict) or "format" not in info:
        raise CheckpointError(f"{path} describes no fxquant package")
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


# --- for whom it was compiled ---------------------------------------------------------------------------------------

_INSTRUCTIONS = ("avx2", "avx512", "vnni", "avx512_bf16", "amx_tile")


def machine() -> dict[str, Any]:
    """What compiled code depends on: the version of torch, the architecture, and the instructions of the processor."""
    found = [name for name in _INSTRUCTIONS if getattr(torch.cpu, f"_is_{name}_supported", lambda: False)()]
    return {"torch": torch.__version__, "system": platform.system(), "processor": platform.machine(), "has": found}


def _check_machine(made_for: Any, path: Path) -> None:
    here = machine()
    with blaming(path):
        for key, what in (("torch", "torch"), ("system", "system"), ("processor", "processor")):
            if made_for[key] != here[key]:
                raise CheckpointError(
                    f"the package was compiled for {what} {made_for[key]}, and this is {here[key]}; export it here"
                )
        missing = [name for name in made_for["has"] if name not in here["has"]]
        if missing:
            raise CheckpointError(
                f"the package was compiled for a processor with {', '.join(missing)}, which this one lacks; export it "
                "on this machine"
            )


# --- signature, config and output -----------------------------------------------------------------------------------


def signature_to_json(signature: inspect.Signature) -> list[dict[str, Any]]:
    """A signature as JSON values. Defaults that are no plain constants count as None."""
    found = []
    for parameter in signature.parameters.values():
        entry: dict[str, Any] = {"name": parameter.name, "kind": parameter.kind.name}
        if parameter.default is not parameter.empty:
            plain = isinstance(parameter.default, (bool, int, float, str, type(None)))
            entry["default"] = parameter.default if plain else None
        found.append(entry)
    return found


def signature_from_json(data: Sequence[Mapping[str, Any]]) -> inspect.Signature:
    """Undo :func:`signature_to_json`."""
    return inspect.Signature(
        [
            inspect.Parameter(
                entry["name"],
                getattr(inspect.Parameter, entry["kind"]),
                default=entry.get("default", inspect.Parameter.empty),
            )
            for entry in data
        ]
    )


def _frozen(config: Mapping[str, Any]) -> Any:
    from diffusers.configuration_utils import FrozenDict

    return FrozenDict(config)


def _import_output_class(info: Mapping[str, Any]) -> None:
    """Import what registers the output class with pytree: a part of diffusers, and of nobody else."""
    for entry in info["graphs"]:
        module = str(entry.get("output_module") or "")
        if module.partition(".")[0] == "diffusers":
            importlib.import_module(module)
