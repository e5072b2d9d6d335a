"""Tensors derived from tensors of the quantized graph, shared by all graphs of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, fx

from fxquant.backends.derived_tensors import shared_or_made
from fxquant.ir.rewriter import Rewriter
from fxquant.ir.time_tables import reads_rows


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
        value = shared_or_made(name, rewriter.tensor(source), others, make)
        rewriter.memo[name] = None if value is None else rewriter.constant(name, value, [source])
    node: fx.Node | None = rewriter.memo[name]
    return node


def by_sample(scale: fx.Node) -> bool:
    """Whether there is one grid for all samples or one per sample, not one per token."""
    return scale.op == "get_attr" or reads_rows(scale)


def only_reader(node: fx.Node) -> fx.Node | None:
    """The only reader of a node; None if there are several readers or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None
