"""Tensors that follow from those of the quantized graph, shared by all graphs of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from fxquant.ir.rewriter import Rewriter
from fxquant.ir.time_tables import reads_rows


def derived(
    source: fx.Node, suffix: str, rewriter: Rewriter, held: Mapping[str, Tensor], make: Callable[[], Tensor | None]
) -> fx.Node | None:
    """The node of a tensor that follows from another: that of another graph, or made here; None for none.

    Args:
        source: Reads the tensor that it follows from.
        suffix: Its name is that of the source, and this.
        rewriter: Of the graph.
        held: What other graphs of the model read.
        make: Makes it; None says that there is none.
    """
    name = f"{source.target}{suffix}"
    if name not in rewriter.memo:
        # Without values nothing can be made; then the other graphs tell whether there is such a tensor.
        without = isinstance(rewriter.tensor(source), FakeTensor)
        value = held.get(name) if without or name in held else make()
        rewriter.memo[name] = None if value is None else rewriter.constant(name, value, [source])
    node: fx.Node | None = rewriter.memo[name]
    return node


def by_sample(scale: object) -> bool:
    """Whether a grid is one for all or one a sample, not one a token."""
    assert isinstance(scale, fx.Node)
    return scale.op == "get_attr" or reads_rows(scale)


def only_reader(node: fx.Node) -> fx.Node | None:
    """The one node that reads a node; None if there are several or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None
