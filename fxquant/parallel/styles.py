"""Which linears of a graph are column-wise and which row-wise, as Megatron-LM pairs them (arXiv 1909.08053).

A row-wise linear reads channels that are divided between ranks. So the walk begins at what each linear reads and goes
back through the graph, until every branch ends in a linear whose output channels can be divided in the same way.
Linears that this does not reach are column-wise, and their output is gathered.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field

import torch
from torch import fx

from fxquant.ir.arguments import args
from fxquant.ir.layers import LAYER_OPS
from fxquant.parallel.divisions import Division, Refine, Refused, shape_of
from fxquant.parallel.linears import Linear, linear_of
from fxquant.parallel.rules import items_of, passed

aten, own = torch.ops.aten, torch.ops.fxquant

_ATTENTION = (aten.scaled_dot_product_attention.default, own.matmul.default, aten.softmax.int)
LARGE = 1 << 18
"""Elements of a float weight from which it is divided."""

_SHOWN = 3  # Names of layers in a reason.
_LEAST_AXES = 3  # [batch, tokens, channels]; sums over ranks of single vectors save nothing.


@dataclass(frozen=True)
class Style:
    """How a linear is divided.

    Attributes:
        kind: ``column`` for its output channels, ``row`` for its input channels, ``whole`` for none.
        runs: The runs of these channels of which each rank holds its share; empty for ``whole``.
        why: The reason, for people.
    """

    kind: str
    runs: tuple[int, ...] = ()
    why: str = field(default="", compare=False)


@dataclass
class Styles:
    """How the linears and values of a graph are divided.

    Attributes:
        linears: The linears of the graph.
        styles: Their styles, by name of the weight.
        ways: Divisions of the values between column-wise and row-wise linears.
    """

    linears: dict[fx.Node, Linear]
    styles: dict[str, Style]
    ways: dict[fx.Node, Division]


def styles_of(graph: fx.Graph, size: int, held: Mapping[str, Style], shared: Set[str]) -> Styles:
    """Choose the style of each linear of a graph.

    Args:
        graph: A quantized graph.
        size: Number of ranks.
        held: Styles that are fixed, by name of the weight: those of graphs that share the tensors.
        shared: Names of tensors that other ops read too.
    """
    return _Chooser(graph, size, held, shared).chosen()


class _Chooser:
    def __init__(self, graph: fx.Graph, size: int, held: Mapping[str, Style], shared: Set[str]) -> None:
        self.size, self.shared, self.held = size, shared, held
        found = ((node, linear_of(node)) for node in graph.nodes)
        self.linears = {node: linear for node, linear in found if linear is not None}
        self.learned = _behind_layers(graph)
        self.ways: dict[fx.Node, Division] = {}
        self.styles: dict[str, Style] = {}
        self.reasons: dict[str, str] = {}
        self.blocked: dict[str, str] = {}
        self.seen: list[Linear] = []  # Linears that the current walk ended in.

    def chosen(self) -> Styles:
        quantized = [linear for linear in self.linears.values() if linear.is_quantized]
        for with_attention in (True, False):  # First, so that q, k and v become column-wise.
            for linear in quantized:
                if linear.x not in self.ways and self._may_be_row(linear):
                    self._try(linear, with_attention)
        for linear in self.linears.values():
            if linear.weight in self.styles:
                continue
            way = self.ways.get(linear.x)
            if not linear.is_quantized and way is not None and way.axis == len(shape_of(linear.x)) - 1:
                self._try(linear, False)
            if linear.weight not in self.styles:
                self.styles[linear.weight] = self._alone(linear)
        return Styles(self.linears, self.styles, self.ways)

    def _may_be_row(self, linear: Linear) -> bool:
        held = self.styles.get(linear.weight) or self.held.get(linear.weight)
        return len(shape_of(linear.x)) >= _LEAST_AXES and (held is None or held.kind == "row")

    def _try(self, linear: Linear, with_attention: bool) -> None:
        """Make a linear row-wise, and what it reads column-wise; leave everything as it is if that is not possible."""
        held = self.styles.get(linear.weight) or self.held.get(linear.weight)
        runs = held.runs if held is not None else (linear.width,)
        try:
            self._walk(linear, runs, with_attention)
        except Refused as refused:
            self.reasons[linear.weight] = str(refused)
            for other in self.seen:
                self.blocked.setdefault(other.weight, f"{linear.name} cannot be row-wise: {refused}")

    def _walk(self, linear: Linear, runs: tuple[int, ...], with_attention: bool) -> None:
        ways, styles = dict(self.ways), dict(self.styles)
        self.seen = []
        last = len(shape_of(linear.x)) - 1
        todo = [(linear.x, Division(last, runs))]
        attention = reached = False
        try:
            self._set(styles, linear, Style("row", runs))
            while todo:
                node, way = todo.pop()
                self._check_even(node, way)
                if node in ways:
                    if ways[node] != way:
                        raise Refused(f"{linear.name} would need the channels divided in another way")
                    reached = True
                    continue
                if node not in self.learned:
                    continue  # Each rank takes its part of a value that no layer made.
                ways[node] = way
                attention |= node.target in _ATTENTION
                if node in self.linears:
                    self._end(node, way, styles)
                    reached = True
                elif node.target is own.low_rank.default:
                    todo.append((args(node).y, way))
                else:
                    todo += passed(node, way, self.size).inputs.items()
                    for item, part in items_of(node, way).items():
                        if ways.setdefault(item, part) != part:
                            raise Refused("parts of one value are divided in different ways")
        except Refine as finer:
            refined = tuple(run * linear.width // sum(finer.runs) for run in finer.runs)
            if refined == runs or sum(refined) != linear.width or linear.weight in self.held:
                raise Refused("the values that it reads are concatenated in another order") from finer
            return self._walk(linear, refined, with_attention)
        if not reached:
            raise Refused("no linear makes what it reads")
        if with_attention and not attention:
            return
        makers = [other.name for other in self.linears.values() if other in self.seen]
        more = f" and {len(makers) - _SHOWN} more" if len(makers) > _SHOWN else ""
        why = f"reads channels of {', '.join(makers[:_SHOWN])}{more}" if makers else "reads divided channels"
        styles[linear.weight] = self.styles.get(linear.weight, Style("row", runs, why))
        for other in self.seen:
            style = styles[other.weight]
            if not style.why:
                styles[other.weight] = Style(style.kind, style.runs, f"its channels go to {linear.name}")
        self.ways, self.styles = ways, styles

    def _end(self, node: fx.Node, way: Division, styles: dict[str, Style]) -> None:
        """Make the linear in which a walk ends column-wise."""
        linear = self.linears[node]
        self.seen.append(linear)
        if way.axis != len(shape_of(node)) - 1:
            raise Refused(f"tokens of {linear.name} would be divided")
        self._set(styles, linear, Style("column", way.runs))

    def _set(self, styles: dict[str, Style], linear: Linear, style: Style) -> None:
        """Give a linear a style.

        Raises:
            Refused: If it has another one, or cannot have this one.
        """
        known = styles.get(linear.weight) or self.held.get(linear.weight)
        if known is not None and known != style:
            raise Refused(f"{linear.name} is {known.kind}-wise" if known.kind != "whole" else f"{linear.name} is whole")
        if any(str(part.target) in self.shared for part in linear.parts()):
            raise Refused(f"another op reads the weight of {linear.name} too")
        for run in style.runs:
            if run % self.size:
                raise Refused(f"{run} channels of {linear.name} are not divisible by {self.size}")
        if style.kind == "column":
            linear.check_column(style.runs, self.size)
        elif style.kind == "row":
            linear.check_row(style.runs, self.size)
        styles.setdefault(linear.weight, known or style)

    def _check_even(self, node: fx.Node, way: Division) -> None:
        uneven = next((run for run in way.runs if run % self.size), None)
        if uneven is not None:
            shape = shape_of(node)
            what = "heads" if len(shape) > _LEAST_AXES and way.axis < len(shape) - 1 else "channels"
            raise Refused(f"{uneven} {what} are not divisible by {self.size}")

    def _alone(self, linear: Linear) -> Style:
        """The style of a linear that no pair includes."""
        held = self.held.get(linear.weight)
        if held is not None:
            return held
        if not linear.is_quantized and linear.out * linear.width < LARGE:
            return Style("whole", why="float and small")
        style = Style("column", (linear.out,), self._reason(linear))
        try:
            self._set({}, linear, style)
        except Refused as refused:
            return Style("whole", why=str(refused))
        return style

    def _reason(self, linear: Linear) -> str:
        """Why the output of a linear is gathered."""
        if len(shape_of(linear.x)) < _LEAST_AXES:
            return "reads one vector per sample"
        reason = self.reasons.get(linear.weight, "ops need all of its channels")
        return self.blocked.get(linear.weight, f"cannot be row-wise: {reason}")


def _behind_layers(graph: fx.Graph) -> set[fx.Node]:
    """The values that depend on what a layer computed."""
    found: set[fx.Node] = set()
    layers = {own.linear.default, own.conv2d.default, *LAYER_OPS}
    for node in graph.nodes:
        if node.target in layers or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found
