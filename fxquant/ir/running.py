"""Runs of a graph with other tensors in place of its own: what changes if a weight is rounded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx


class _With(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, tensors: Mapping[fx.Node, Tensor]) -> None:
        super().__init__(module)
        self._tensors = tensors

    def run_node(self, n: fx.Node) -> Any:
        return self._tensors[n] if n in self._tensors else super().run_node(n)


def run_with(
    module: fx.GraphModule, inputs: Sequence[Tensor], tensors: Mapping[fx.Node, Tensor] | None = None
) -> tuple[Any, ...]:
    """Run a graph, with other values for some of its nodes. The graph and its tensors do not change.

    Args:
        module: The graph, with its tensors.
        inputs: One tensor per input of the graph, as in ``context.inputs``.
        tensors: Values by node, such as a rounded weight by the ``get_attr`` node that ``stored_weight`` finds.

    Returns:
        The outputs of the graph, without gradients. For most models the first is the prediction.
    """
    with torch.no_grad():
        return tuple(_With(module, tensors or {}).run(*inputs))
