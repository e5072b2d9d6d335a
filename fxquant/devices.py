"""Traced graphs name the device that they were traced on; this moves them to another."""

from __future__ import annotations

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
