"""Tensors in the form that kernels read, derived from those of the quantized graph, once for all graphs of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from fxquant.ir.rewriter import Rewriter


def derived(
    source: fx.Node, suffix: str, rewriter: Rewriter, others: Mapping[str, Tensor], make: Callable[[], Tensor | None]
) -> fx.Node | None:
    """The node of a tensor derived from another tensor, of another graph or made here; None if there is none.

    Args:
        source: Node that reads the original tensor.
        suffix: Appended to the name of the source; the result is the name of the new tensor.
        rewriter: The rewriter of the graph.
        others: Tensors that other graphs of the model read, by name.
        make: Makes the new tensor; returns None if there is none.
    """
    name = f"{source.target}{suffix}"
    if name not in rewriter.memo:
        # A fake tensor has no values to derive from. Then the other graphs show whether there is such a tensor.
        without = isinstance(rewriter.tensor(source), FakeTensor)
        value = others.get(name) if without or name in others else make()
        rewriter.memo[name] = None if value is None else rewriter.constant(name, value, [source])
    node: fx.Node | None = rewriter.memo[name]
    return node


def has_own_scales(packed: fx.Node, scale: fx.Node) -> bool:
    """Whether each output channel of a weight has scales of its own, as kernels expect."""
    return bool(packed.meta["val"].shape[0] == scale.meta["val"].shape[0])
