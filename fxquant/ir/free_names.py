"""Names under which a pass can add tensors to a graph module."""

from __future__ import annotations

import keyword
from collections import Counter
from collections.abc import Mapping

from torch import fx, nn

from fxquant.ir.meta import NAMES

_ATTRIBUTES = frozenset({*dir(fx.GraphModule), *vars(nn.Module()), "meta"})
"""Attributes of a graph module, which no tensor may replace."""


def allowed_name(name: str, model: Mapping[str, bool]) -> str:
    """The name itself or a similar one, under which a tensor can be an attribute of a graph module or of its modules.

    Args:
        name: The name, such as ``blocks.0.to_q.weight.scale``.
        model: The names that the model itself uses; see :data:`fxquant.ir.meta.NAMES`.
    """
    # FX writes names into code between double quotes, as they are.
    name = "".join(char if char.isprintable() and char not in "\"'\\" else "_" for char in name)
    path = [part or "_" for part in name.split(".")]
    name = ".".join(path)
    for end in range(len(path) - 1, 0, -1):
        if model.get(".".join(path[:end])):  # A parameter, which cannot contain another one.
            name = ".".join(path[:end]) + "_" + "_".join(path[end:])
    if keyword.iskeyword(path[0]) or path[0] in _ATTRIBUTES:
        name = f"tensor_{name}"  # Under its own name it would replace an attribute of the graph module.
    return name


class FreeNames:
    """The names that nodes of one graph read, and those that the model itself uses, even if this graph does not.

    Graphs of one model share names, so a name of the model is taken in each of them.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self._model = module.meta.get(NAMES, {})
        self._taken = Counter(str(node.target) for node in module.graph.nodes if node.op == "get_attr")

    def take(self, name: str) -> str:
        """Take this name, or a similar one that is free and allowed."""
        name = allowed_name(name, self._model)
        target, number = name, 2
        while self._taken[target] or target in self._model:
            target, number = f"{name}_{number}", number + 1
        self.read(target)
        return target

    def read(self, target: str) -> None:
        """Take note of a further node that reads this name."""
        self._taken[target] += 1

    def forget(self, target: str) -> None:
        """Take note that a node that read this name is gone."""
        self._taken[target] -= 1
