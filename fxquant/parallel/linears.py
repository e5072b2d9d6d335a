"""Linears of a quantized graph as they are divided: their weights, in which form, and what divides these evenly."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxquant.ir.arguments import args
from fxquant.ir.layers import layer_name, layer_of, stored_weight
from fxquant.numerics.formats import bits_of
from fxquant.parallel.divisions import Refused, shape_of

aten, own = torch.ops.aten, torch.ops.fxquant


@dataclass(frozen=True)
class Linear:
    """A linear of a graph.

    Attributes:
        node: The product: ``fxquant::linear``, or ``aten::linear`` with a stored or dequantized weight.
        weight: Name of the tensor of its weight or of its codes.
        holder: The node whose arguments name the codes and scales; None for a float weight.
        out: Number of output channels.
        width: Number of input channels.
    """

    node: fx.Node
    weight: str
    holder: fx.Node | None
    out: int
    width: int

    @property
    def name(self) -> str:
        """Its name in the model."""
        return layer_of(self.node) or layer_name(self.weight.removesuffix("_packed"))

    @property
    def x(self) -> fx.Node:
        """What it reads: codes, or a float value."""
        given = args(self.node)
        found: fx.Node = given.xq if self.holder is self.node else given.input
        return found

    @property
    def is_quantized(self) -> bool:
        """Whether its weight is stored as codes."""
        return self.holder is not None

    @property
    def bias(self) -> fx.Node | None:
        """What it adds to its product, or None."""
        found: fx.Node | None = args(self.node).bias
        return found

    @property
    def group(self) -> int:
        """Input channels with one scale; 0 for all of them."""
        return 0 if self.holder is None else int(args(self.holder).group_size)

    @property
    def bits(self) -> int:
        """Bits of a code; 0 for a float weight."""
        if self.holder is None:
            return 0
        given = args(self.holder)
        return bits_of(given.w_format if self.holder.target is own.linear.default else given.format)

    def parts(self) -> list[fx.Node]:
        """The nodes that read its codes, scales and zero points; or its float weight."""
        if self.holder is None:
            weight = stored_weight(self.node)
            assert weight is not None
            return [weight]
        given = args(self.holder)
        direct = self.holder.target is own.linear.default
        names = ("wq", "w_scale", "w_zero_point") if direct else ("wq", "scale", "zero_point")
        return [part for name in names if (part := getattr(given, name)) is not None]

    def check_column(self, runs: Iterable[int], size: int) -> None:
        """Refuse runs of output channels of which ranks would not hold whole scales.

        Raises:
            Refused: If so.
        """
        if self.holder is None:
            return
        shared = self.out // int(shape_of(self.parts()[1])[0])
        if any(run // size % shared for run in runs):
            raise Refused(f"{shared} output channels have one scale and would be on several ranks")

    def check_row(self, runs: Iterable[int], size: int) -> None:
        """Refuse runs of input channels of which ranks would not hold whole groups.

        Raises:
            Refused: If so.
        """
        if self.group and any(run // size % self.group for run in runs):
            raise Refused(f"groups of {self.group} input channels have one scale and would be on several ranks")


def linear_of(node: fx.Node) -> Linear | None:
    """The linear whose product a node is; None if it is not one with a stored weight."""
    if node.target is own.linear.default:
        codes = args(node).wq
        x = args(node).xq
        return _made(node, codes, node, x) if _is_stored(codes) else None
    if node.target is not aten.linear.default:
        return None
    weight, x = args(node).weight, args(node).input
    if isinstance(weight, fx.Node) and weight.target is own.dequantize_weight.default:
        codes = args(weight).wq
        return _made(node, codes, weight, x) if _is_stored(codes) and len(weight.users) == 1 else None
    stored = stored_weight(node)
    return None if stored is None else _made(node, stored, None, x)


def _made(node: fx.Node, stored: fx.Node, holder: fx.Node | None, x: fx.Node) -> Linear:
    return Linear(node, str(stored.target), holder, int(shape_of(node)[-1]), int(shape_of(x)[-1]))


def _is_stored(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr"


def read_by_others(graphs: Iterable[fx.Graph]) -> set[str]:
    """Names of tensors that more than one op reads, unless all of them are uses of one linear."""
    readers: dict[str, set[Any]] = defaultdict(set)
    for number, graph in enumerate(graphs):
        for node in graph.nodes:
            if node.op == "get_attr":
                for reader in node.users:
                    found = linear_of(reader) or next(filter(None, map(linear_of, reader.users)), None)
                    one = found is not None and node in (*found.parts(), found.bias)
                    readers[str(node.target)].add(
                        found.weight if one and found is not None else (number, reader.target, _layer(reader))
                    )
    return {target for target, found in readers.items() if len(found) > 1}


def _layer(node: fx.Node) -> str:
    return layer_of(node) or node.name
