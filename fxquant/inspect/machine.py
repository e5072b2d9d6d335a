"""What is installed on this machine, what it can run, and where caches are, for ``fxquant doctor``."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir

from fxquant.errors import BackendError, FxquantError
from fxquant.pipeline.backend import BACKENDS

PACKAGES = ("fxquant", "torch", "diffusers", "torchao", "triton", "peft", "accelerate", "transformers", "safetensors")
_INSTRUCTIONS = {"AVX2": "avx2", "AVX-512": "avx512_f", "AVX-512 VNNI": "avx512_vnni", "AVX-512 BF16": "avx512_bf16",
                 "AMX tiles": "amx_tile", "AMX int8": "amx_int8"}  # fmt: skip


def examine() -> dict[str, dict[str, Any]]:
    """Examine the machine; backends compile their kernels, if they are not compiled yet.

    Returns:
        Sections ``versions``, ``processor``, ``devices``, ``backends`` and ``caches``, each with values that JSON can
        hold. A backend has one text for each type of device.
    """
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "processor": _processor(),
        "devices": _devices(),
        "backends": {name: _backend(name) for name in BACKENDS},
        "caches": _caches(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> dict[str, Any]:
    known = torch.cpu.get_capabilities()
    found = {name: bool(known.get(key, False)) for name, key in _INSTRUCTIONS.items()}
    return {
        "architecture": platform.machine(),
        **found,
        "torch uses": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads of torch": torch.get_num_threads(),
    }


def _devices() -> dict[str, str]:
    found = {"cpu": "available"}
    if not torch.cuda.is_available():
        found["cuda"] = "torch was built without CUDA" if torch.version.cuda is None else "torch finds no NVIDIA GPU"
    for number in range(torch.cuda.device_count()):
        props = torch.cuda.get_device_properties(number)
        found[f"cuda:{number}"] = (
            f"{props.name}, compute capability {props.major}.{props.minor}, {props.total_memory / 2**30:.0f} GiB"
        )
    return found


def _backend(name: str) -> dict[str, str]:
    """What a backend runs, by type of device."""
    try:
        kind = BACKENDS[name]
    except (FxquantError, ImportError) as error:
        return {"all devices": f"not available: {error}"}
    found = {}
    for device in sorted(kind.devices or ("cpu", "cuda")):
        try:
            if device == "cuda" and not torch.cuda.is_available():
                raise BackendError("torch finds no NVIDIA GPU here")
            found[device] = kind().describe(torch.device(device))
        except FxquantError as error:
            found[device] = f"does not run: {error}"
    return found


def _caches() -> dict[str, str]:
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return {
        "kernels": os.environ.get("FXQUANT_CACHE") or os.path.join(cache, "fxquant"),
        "torch.compile": cache_dir(),
        "models of the hub": HF_HUB_CACHE,
    }
