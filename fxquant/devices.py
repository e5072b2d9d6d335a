"""Devices that traced graphs name, and memory of the processor."""

from __future__ import annotations

import ctypes
import sys

import torch
from torch import fx


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
