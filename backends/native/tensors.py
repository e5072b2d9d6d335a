"""What lowerings ask about nodes: whether a grid is per sample, and who reads a value."""

from __future__ import annotations

from torch import fx

from fxquant.ir.time_tables import reads_rows


def by_sample(scale: fx.Node) -> bool:
    """Whether there is one grid for all samples or one per sample, not one per token."""
    return scale.op == "get_attr" or reads_rows(scale)


def only_reader(node: fx.Node) -> fx.Node | None:
    """The only reader of a node; None if there are several readers or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None
