"""Devices: which ones can be used here, which ones traced graphs name, and returning CPU memory to the system."""

from __future__ import annotations

import ctypes
import sys

import torch
from torch import fx

from fxquant.errors import ConfigurationError


def usable_device(device: str | torch.device) -> torch.device:
    """Return the device of this name, such as ``cpu``, ``cuda`` or ``cuda:1``, after creating a tensor on it.

    Raises:
        ConfigurationError: If there is no such device here.
    """
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # Depends on the device type and the torch build.
        # For a device type that torch was built without, torch lists all types that it was built with on one line.
        first = str(error).strip().partition("\n")[0].partition(". ")[0].rstrip(".")
        raise ConfigurationError(
            f"device {str(device)!r} cannot be used here: {first}. "
            "Use 'cuda' on NVIDIA GPUs, with a build of torch for CUDA, or 'cpu' on any machine"
        ) from error
    return found


def retarget(module: fx.GraphModule, device: torch.device) -> None:
    """Replace the device in every op of a graph that names one (``arange(device=...)``, ``to(device)``)."""

    def swap(value: object) -> object:
        return device if isinstance(value, torch.device) else value

    for node in module.graph.nodes:
        if node.op == "call_function":
            node.args = tuple(swap(value) for value in node.args)
            node.kwargs = {name: swap(value) for name, value in node.kwargs.items()}
    module.recompile()


def give_back_memory() -> None:
    """Return freed memory to the system.

    glibc keeps freed memory; while weights are lowered, that is as much as the size of all weights.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
