"""Checks what a device and an installed Triton can run."""

from __future__ import annotations

import functools
import os
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from fxquant.backends.native.compiled.build import cache_folder
from fxquant.errors import BackendError

OLDEST_TRITON = (3, 6)
# The lowest compute capabilities whose tensor cores multiply, in Triton, signed bytes and 8-bit floats.
_INTEGERS = (8, 0)
_FP8 = (8, 9)
# Those with which torch multiplies block formats. The kernel of mxfp4 is built for 10.x alone.
_BLOCKS = {"mxfp8": (10, 0), "nvfp4": (10, 0), "mxfp4": (10, 0)}
_MXFP4_MAJOR = 10


def interprets() -> bool:
    """Whether kernels run in Triton's interpreter: on any CPU, very slowly."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def missing(device: torch.device, fp8: bool = False) -> str | None:
    """Why the kernels cannot run on a device, and what to use instead; None if they can.

    Args:
        device: The device of the tensors.
        fp8: Whether the kernels multiply 8-bit floats.
    """
    reason = missing_triton()
    if reason is not None:
        return reason
    if device.type == "cpu":
        if interprets():
            return None
        return "Triton kernels run on NVIDIA GPUs; on a CPU they run only in its interpreter (TRITON_INTERPRET=1)"
    return _missing_on_gpu(device, fp8)


@functools.cache
def _missing_on_gpu(device: torch.device, fp8: bool) -> str | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return f"Triton kernels are written for NVIDIA GPUs, not for {device.type}"
    if not torch.cuda.is_available():
        return "torch finds no NVIDIA GPU here; leave the model on the CPU, or use backend 'fake-quant' there"
    needed = _FP8 if fp8 else _INTEGERS
    found = torch.cuda.get_device_capability(device)
    if found < needed:
        what = "products of 8-bit floats need" if fp8 else "products of signed bytes need"
        instead = "; use a precision such as w8a8" if fp8 and found >= _INTEGERS else "; use backend 'fake-quant'"
        return (
            f"{torch.cuda.get_device_name(device)} has compute capability {found[0]}.{found[1]}, and {what} "
            f"{needed[0]}.{needed[1]}{instead}"
        )
    return None


def missing_blocks(device: torch.device, format: str) -> str | None:
    """Why torch cannot multiply a block format on a device, and what to use instead; None if it can.

    Args:
        device: The device of the tensors.
        format: ``mxfp8``, ``mxfp4`` or ``nvfp4``.
    """
    if device.type != "cuda":
        return f"torch multiplies {format} on NVIDIA GPUs only, not on {device.type}; use backend 'fake-quant'"
    reason = missing(device)
    if reason is not None:
        return reason
    found, needed = torch.cuda.get_device_capability(device), _BLOCKS[format]
    if found >= needed and (format != "mxfp4" or found[0] == _MXFP4_MAJOR):
        return None
    wanted = "10.x" if format == "mxfp4" else f"{needed[0]}.{needed[1]}"
    return (
        f"{torch.cuda.get_device_name(device)} has compute capability {found[0]}.{found[1]}, and products of {format} "
        f"need {wanted}; use a precision such as w8a8 or wfp8afp8, or backend 'fake-quant'"
    )


def block_formats(device: torch.device) -> frozenset[str]:
    """Names of the block formats that torch multiplies on a device."""
    return frozenset(format for format in _BLOCKS if missing_blocks(device, format) is None)


def check_tensors(op: str, first: Tensor, *others: Tensor | None) -> None:
    """Refuse tensors on a device that kernels cannot run on, or on more than one device.

    Raises:
        BackendError: If tensors are refused. The message says why, and what to do.
    """
    reason = missing(first.device, fp8=first.dtype == torch.float8_e4m3fn)
    if reason is not None:
        raise BackendError(f"{op} cannot run: {reason}")
    strange = {str(other.device) for other in others if other is not None and other.device != first.device}
    if strange:
        raise BackendError(
            f"{op} was called with tensors on {first.device} and on {', '.join(sorted(strange))}; "
            "move the model and its inputs to one device"
        )


@functools.cache
def name(device: torch.device) -> str:
    """The name of a device in tuned tables."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.cache
def missing_triton() -> str | None:
    """Why Triton cannot be used; None if it can."""
    wanted = ".".join(map(str, OLDEST_TRITON))
    try:
        found = version("triton")
    except PackageNotFoundError:
        return f"the package triton is not installed; pip install 'triton>={wanted}'"
    numbers = tuple(int(part) for part in re.findall(r"\d+", found)[:2])
    if numbers < OLDEST_TRITON:
        return f"triton {found} is too old; pip install 'triton>={wanted}', which torch 2.11 and newer bring along"
    return None


def tuned_files() -> list[Path]:
    """Tables of tuned configurations: the shipped one, then the user's, which takes precedence."""
    return [Path(__file__).with_name("configs.json"), cache_folder() / "gpu-configs.json"]
