"""Writes graphs as text, to check whether two captures gave the same function."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate


def fingerprint(graph: fx.Graph) -> tuple[str, ...]:
    """One line per node: its op, target and arguments. Names of nodes, metadata and devices are left out.

    Texts can be compared only within one process, because some ops print their address.
    """
    numbers = {node: f"%{number}" for number, node in enumerate(graph.nodes)}

    def shown(leaf: Any) -> Any:
        if isinstance(leaf, fx.Node):
            return numbers[leaf]
        return "device" if isinstance(leaf, torch.device) else leaf

    def line(node: fx.Node) -> str:
        target = "" if node.op in ("placeholder", "output") else node.target
        return f"{node.op} {target} {map_aggregate(node.args, shown)} {map_aggregate(node.kwargs, shown)}"

    return tuple(map(line, graph.nodes))
