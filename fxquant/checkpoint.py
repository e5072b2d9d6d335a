"""Checkpoints: ``config.json``, ``plan.json`` and safetensors. No pickle, no float weights, no torch version.

``plan.json`` holds the digest of every other file and of itself, so that a damaged checkpoint is refused, not run.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fxquant.api import model_from_plan
from fxquant.backend import Backend, resolve_backend
from fxquant.capture import Architecture
from fxquant.errors import CheckpointError, ConfigurationError
from fxquant.model import GraphModel
from fxquant.plan import PLAN_FILE, VECTORS_FILE, Plan

CONFIG_FILE = "config.json"
TENSORS_FILE = "model.safetensors"
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}


def save(model: nn.Module, folder: str | Path, *, overwrite: bool = False) -> None:
    """Write a quantized model to a folder, all of it or nothing.

    Args:
        model: What :func:`fxquant.compile` returned.
        folder: Where to; made, with its parents.
        overwrite: Replace a folder that exists.

    Raises:
        ConfigurationError: If the model is not quantized.
        CheckpointError: If the folder exists and ``overwrite`` is not given.
    """
    if not isinstance(model, GraphModel) or model.plan is None:
        raise ConfigurationError(f"save takes a model that fxquant.compile made, not a {type(model).__name__}")
    folder = Path(folder)
    if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists; choose another folder or pass overwrite=True")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        written = Path(scratch) / "checkpoint"
        written.mkdir()
        _write(model, model.plan, written)
        if folder.exists():
            old = Path(scratch) / "old"
            folder.rename(old)
        written.rename(folder)


def _write(model: GraphModel, plan: Plan, folder: Path) -> None:
    config = dict(getattr(model.architecture.skeleton, "config", {}) or {})
    config.pop("_name_or_path", None)  # Where it was read from: a path on this machine.
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.tensors().items()}
    save_file(_unshared(tensors), folder / TENSORS_FILE, metadata={"format": "pt"})
    plan.save(folder)
    data = json.loads((folder / PLAN_FILE).read_text(encoding="utf-8"))
    data["dtype"] = str(model.dtype).removeprefix("torch.")
    data["files"] = {name: _digest(folder / name) for name in (CONFIG_FILE, TENSORS_FILE, VECTORS_FILE)}
    data["digest"] = _digest_of(data)
    (folder / PLAN_FILE).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def load(
    folder: str | Path,
    *,
    backend: str | Backend | None = None,
    device: str | torch.device = "cpu",
    model: nn.Module | type[nn.Module] | None = None,
) -> GraphModel:
    """Read a quantized model back. Float weights are neither needed nor made.

    Args:
        folder: What :func:`save` wrote.
        backend: Another backend than the one it was compiled for.
        device: Where the tensors go.
        model: For a model that is not from diffusers: its class (with ``from_config``), or an instance of it.

    Raises:
        CheckpointError: If a file is missing, damaged, unsafe, of a newer format or of another model.
    """
    folder = Path(folder)
    data = _read_plan(folder)
    _refuse_pickles(folder)
    _check_files(folder, data)
    plan = Plan.from_json(data, _read_tensors(folder / VECTORS_FILE, torch.device("cpu")))
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    architecture = _architecture(plan, config, model, folder)
    tensors = _read_tensors(folder / TENSORS_FILE, torch.device(device))
    dtype = getattr(torch, data["dtype"])
    runner = resolve_backend(plan.backend if backend is None else backend)
    plan.backend = runner.name
    return model_from_plan(architecture, plan, runner, dtype, tensors)


def _architecture(plan: Plan, config: Mapping[str, Any], model: Any, folder: Path) -> Architecture:
    if isinstance(model, nn.Module):
        return Architecture.of(model, plan.timestep)
    if model is None:
        module, _, name = plan.model_class.partition(":")
        if module != "diffusers":  # Importing whatever a file names would run code that a stranger chose.
            raise CheckpointError(
                f"{folder} holds a {name} from {module}, which is not a diffusers model; "
                "pass its class or an instance: fxquant.load(folder, model=...)"
            )
        model = getattr(importlib.import_module("diffusers"), name, None)
        if model is None:
            raise CheckpointError(f"the installed diffusers has no {name}; install a version that does")
    return Architecture.from_config(model, config, plan.timestep)


def _read_plan(folder: Path) -> dict[str, Any]:
    path = folder / PLAN_FILE
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}")
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: {folder} is not an fxquant checkpoint, or not all of it was copied")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); copy the checkpoint again") from error
    if not isinstance(data, dict) or "format" not in data:
        raise CheckpointError(f"{path} is not an fxquant plan")
    if isinstance(data["format"], int) and data["format"] <= _known_format() and data.get("digest") != _digest_of(data):
        raise CheckpointError(
            f"{path} does not match its digest: it is damaged or was edited. Copy the checkpoint again; to change a "
            "plan, load it with fxquant.Plan.load, edit it and compile the float model with plan="
        )
    return data


def _known_format() -> int:
    from fxquant.plan import FORMAT

    return FORMAT


def _check_files(folder: Path, data: Mapping[str, Any]) -> None:
    for name, digest in dict(data.get("files", {})).items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; copy the checkpoint again")
        if _digest(path) != digest:
            raise CheckpointError(f"{path} is damaged: its bytes do not match the digest in {PLAN_FILE}; copy it again")


def _refuse_pickles(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        if path.suffix in _PICKLES:
            raise CheckpointError(
                f"{path} is a pickle, which can run code when read; fxquant writes none. Remove it if you trust the rest"
            )


def _read_tensors(path: Path, device: torch.device) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}; copy the checkpoint again") from error


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share memory would be refused by safetensors: write each by itself."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    return found


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(data: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in data.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
