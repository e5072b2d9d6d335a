"""Devices that can be used here, those that traced graphs name, and memory of the processor."""

from __future__ import annotations

import ctypes
import sys

import torch
from torch import fx

from fxquant.errors import ConfigurationError


def usable_device(device: str | torch.device) -> torch.device:
    """The device of that name, such as ``cpu``, ``cuda`` or ``cuda:1``, on which tensors can be made.

    Raises:
        ConfigurationError: If there is no such device here.
    """
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # By kind of device and build of torch.
        # Of devices that torch was built without, it lists on one line all that it was built with.
        first = str(error).strip().partition("\n")[0].partition(". ")[0].rstrip(".")
        raise ConfigurationError(
            f"device {str(device)!r} cannot be used here: {first}. "
            "On NVIDIA GPUs it is 'cuda', with a build of torch for CUDA; everywhere 'cpu'"
        ) from error
    return found


def retarget(module: fx.GraphModule, device: torch.device) -> None:
    """Let every op of a graph that names a device (``arange(device=...)``, ``to(device)``) name another one."""

    def swap(value: object) -> object:
        return device if isinstance(value, torch.device) else value

    for node in module.graph.nodes:
        if node.op == "call_function":
            node.args = tuple(swap(value) for value in node.args)
            node.kwargs = {name: swap(value) for name, value in node.kwargs.items()}
    module.recompile()


def give_back_memory() -> None:
    """Hand freed memory back to the system, which glibc keeps: while weights are lowered, as much as all of them."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
