"""Rewrites a quantized graph to the part of one rank."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxquant.ir.arguments import args
from fxquant.ir.meta import PROVENANCE
from fxquant.ir.tensors import fake_mode_of
from fxquant.numerics.formats import FORMATS
from fxquant.numerics.grids import compute_dtype
from fxquant.parallel import exchange
from fxquant.parallel.cuts import Cut, Cuts, add_cut
from fxquant.parallel.divisions import Division, shape_of
from fxquant.parallel.linears import Linear
from fxquant.parallel.rules import aligned, passed
from fxquant.parallel.styles import Style, Styles

aten, own = torch.ops.aten, torch.ops.fxquant


@dataclass(frozen=True)
class Seat:
    """The place of this process among the ranks.

    Attributes:
        rank: Its number, from 0.
        size: Number of ranks.
        group: Name of their process group.
    """

    rank: int
    size: int
    group: str


def insert(module: fx.GraphModule, styles: Styles, seat: Seat, cuts: Cuts, shared: Set[str], further: bool) -> None:
    """Rewrite a graph in place to what one rank computes. Its tensors stay whole; :mod:`cuts` divides them.

    Args:
        module: The quantized graph.
        styles: How its linears and values are divided.
        seat: Which rank this is.
        cuts: How tensors are divided; those that the graph needs are added, unless ``further``.
        shared: Names of tensors that several ops read, which stay whole.
        further: Whether the tensors were divided before, for other graphs; then no other tensor may be.
    """
    _Insertion(module, styles, seat, cuts, shared, further).run()


class _Insertion:
    def __init__(
        self, module: fx.GraphModule, styles: Styles, seat: Seat, cuts: Cuts, shared: Set[str], further: bool
    ) -> None:
        self.module, self.graph, self.found, self.seat = module, module.graph, styles, seat
        self.cuts, self.shared, self.further = cuts, shared, further
        self.actual: dict[fx.Node, Division] = {}
        self.made: dict[tuple[fx.Node, Division | None], fx.Node] = {}
        self.local: dict[fx.Node, Division] = {}  # Whose recorded shape becomes that of one rank.

    def run(self) -> None:
        weights = self._weights()
        for node in list(self.graph.nodes):
            self._tensor(node)
            linear = self.found.linears.get(node)
            style = self.found.styles[linear.weight] if linear is not None else Style("whole")
            if linear is not None and style.kind == "column":
                self._column(linear, style)
            elif linear is not None and style.kind == "row":
                self._row(linear, style)
            elif node.target is own.low_rank.default:
                self._branch(node)
            elif node in self.found.ways:
                self._divided(node)
            elif node.target in (own.token_grid.default, own.token_scale.default) and self._ends_divided(node):
                x = args(node).x
                self._replace(node, x, self._call(exchange.extremes, (x, self.seat.group), x))
            elif node.op != "get_attr" and node not in self.actual and node not in weights:
                for source in node.all_input_nodes:
                    self._read(node, source, None)
        self._record_shapes()
        self.graph.lint()
        self.module.recompile()

    def _weights(self) -> set[fx.Node]:
        """The ops that make weights of divided linears from their parts."""
        found: set[fx.Node] = set()
        for linear in self.found.linears.values():
            if self.found.styles[linear.weight].kind != "whole":
                found.update(self._casts(linear) if linear.holder is None else {linear.holder} - {linear.node})
        return found

    def _tensor(self, node: fx.Node) -> None:
        cut = self.cuts.get(str(node.target)) if node.op == "get_attr" and self.further else None
        if cut is not None and not cut.bits:
            self._is(node, cut.division)

    def _divided(self, node: fx.Node) -> None:
        """An op between column-wise and row-wise linears: each rank computes its channels."""
        way = self.found.ways[node]
        rule = passed(node, way, self.seat.size)
        for source in node.all_input_nodes:
            self._read(node, source, rule.inputs.get(source))
        if rule.target is not None:
            node.args, node.kwargs = (node.args[0], *rule.changed.values()), {}
            node.target = rule.target
        elif rule.changed:
            node.args = args(node).replaced(**rule.changed)
        self._is(node, way)

    def _column(self, linear: Linear, style: Style) -> None:
        node = linear.node
        way = Division(len(shape_of(node)) - 1, style.runs)
        self._cut_weight(linear, Division(0, style.runs))
        stored = {*linear.parts(), linear.holder}
        for source in node.all_input_nodes:
            if source is linear.bias:
                self._cut(source, Division(0, style.runs))
                self._read(node, source, aligned(source, way, way.axis + 1))
            elif source not in stored:
                self._read(node, source, self.actual.get(source) if self._makes_weight(linear, source) else None)
        self._is(node, way)

    def _row(self, linear: Linear, style: Style) -> None:
        node, bias = linear.node, linear.bias
        way = Division(len(shape_of(linear.x)) - 1, style.runs)
        self._cut_weight(linear, Division(1, style.runs))
        given = args(node)
        wide = compute_dtype(given.out_dtype if linear.holder is node else node.meta["val"].dtype)
        scales: dict[fx.Node, Division] = {}  # Others are the same for all channels.
        if linear.holder is node:
            block = FORMATS[given.x_format].block
            scales = {given.x_scale: way.scaled(1, block)} if block else {}
        stored = {*linear.parts(), linear.holder, bias}
        for source in node.all_input_nodes:
            if source is linear.x:
                self._read(node, source, way)
            elif source not in stored and not self._makes_weight(linear, source):
                self._read(node, source, scales.get(source))
        dtype = node.meta["val"].dtype
        node.args = args(node).replaced(bias=None, **({"out_dtype": wide} if linear.holder is node else {}))
        with self.graph.inserting_after(node):
            total = self.graph.call_function(exchange.summed, (node, self.seat.group))
        with self.graph.inserting_after(total):
            whole = self.graph.call_function(exchange.with_bias, (total, self._whole(bias), dtype))
        for made in (total, whole):
            self._describe(made, node)
        node.replace_all_uses_with(whole, delete_user_cb=lambda reader: reader is not total)

    def _branch(self, node: fx.Node) -> None:
        """A branch of low rank: column-wise with its layer, and row-wise where its input is divided."""
        given = args(node)
        y, x, a, b = given.y, given.x, given.a, given.b
        way = self.found.ways.get(node)
        if way is not None:
            self._cut(b, Division(0, way.runs))
            self._read(node, y, way)
            self._read(node, b, Division(0, way.runs))
            for source in (x, a, given.offset):
                if source is not None:
                    self._read(node, source, None)
            self._is(node, way)
            return
        held = self.actual.get(x)
        last = len(shape_of(x)) - 1
        if held is None or held.axis != last or not self._cut(a, Division(1, held.runs)):
            for source in node.all_input_nodes:
                self._read(node, source, None)
            return
        offset, strength = given.offset, given.strength
        part = self._as(a, Division(1, held.runs), node)
        with self.graph.inserting_before(node):
            inner = self.graph.call_function(exchange.inner_of, (x, part, self.seat.group))
            rest = (self._whole(y), inner, self._whole(b), self._whole(offset), self._whole(strength))
            whole = self.graph.call_function(exchange.with_branch, rest)
        self._describe(whole, node)
        with fake_mode_of(self.graph):
            inner.meta["val"] = x.meta["val"].new_empty((*shape_of(x)[:-1], int(shape_of(a)[0])))
        node.replace_all_uses_with(whole)
        self.graph.erase_node(node)

    def _cut_weight(self, linear: Linear, division: Division) -> None:
        """Divide the codes, scales and zero points of a linear, or its float weight."""
        parts = linear.parts()
        if linear.holder is None:
            self._cut(parts[0], division)
            for source in self._casts(linear):
                self._is(source, division)
            return
        self._add(parts[0], Cut(division, linear.bits if division.axis == 1 else 0))
        for scales in parts[1:]:
            if division.axis == 0:
                self._add(scales, Cut(division.scaled(int(shape_of(scales)[0]), linear.out)))
            elif linear.group:
                self._add(scales, Cut(division.scaled(1, linear.group)))
        if linear.holder is not linear.node:
            self._is(linear.holder, division)
            if division.axis == 1:
                local = division.whole // self.seat.size
                linear.holder.args = args(linear.holder).replaced(in_features=local)

    def _add(self, node: fx.Node, cut: Cut) -> None:
        if not self.further:
            add_cut(self.cuts, str(node.target), cut)

    def _cut(self, node: fx.Node, division: Division) -> bool:
        """Divide a float tensor that one op reads, if tensors can still be; whether each rank holds its part then."""
        target = str(node.target)
        if node.op == "get_attr" and len(shape_of(node)) > division.axis and target not in self.shared:
            whole = int(shape_of(node)[division.axis]) == division.whole
            if whole and not self.further:
                add_cut(self.cuts, target, Cut(division))
            if self.cuts.get(target) == Cut(division):
                self._is(node, division)
                return True
        return False

    def _casts(self, linear: Linear) -> list[fx.Node]:
        found, node = [], args(linear.node).weight
        while node.op != "get_attr":
            found.append(node)
            node = node.args[0]
        return found

    def _makes_weight(self, linear: Linear, source: fx.Node) -> bool:
        return linear.holder is not linear.node and source is args(linear.node).weight

    def _ends_divided(self, node: fx.Node) -> bool:
        x = args(node).x
        way = self.actual.get(x)
        return way is not None and way.axis == len(shape_of(x)) - 1

    def _is(self, node: fx.Node | None, way: Division) -> None:
        assert node is not None
        self.actual[node] = self.local[node] = way

    def _read(self, node: fx.Node, source: fx.Node, way: Division | None) -> None:
        """Let a node read a value divided in this way, or whole."""
        self._replace(node, source, self._as(source, way, node))

    def _whole(self, source: Any) -> Any:
        return self._as(source, None) if isinstance(source, fx.Node) else source

    def _replace(self, node: fx.Node, old: fx.Node, new: fx.Node) -> None:
        if old is not new:
            node.replace_input_with(old, new)

    def _as(self, source: fx.Node, way: Division | None, reader: fx.Node | None = None) -> fx.Node:
        """A value divided in this way, exchanged between ranks if it is divided in another."""
        held = self.actual.get(source)
        if held == way:
            return source
        key = (source, way)
        if key in self.made:
            return self.made[key]
        size, group = self.seat.size, self.seat.group
        if held is not None:
            whole = self.made.get((source, None))
            if whole is None:
                runs = (source, held.axis, held.runs, size, group)
                whole = self.made[source, None] = self._call(exchange.gathered, runs, source)
            if way is None:
                return whole
            source = whole
        assert way is not None
        share = (source, way.axis, way.runs, self.seat.rank, size)
        self.made[key] = self._call(exchange.share_of, share, source)
        self.local[self.made[key]] = way
        return self.made[key]

    def _call(self, function: Any, arguments: tuple[Any, ...], source: fx.Node) -> fx.Node:
        """Call a function behind a value."""
        with self.graph.inserting_after(source):
            made = self.graph.call_function(function, arguments)
        self._describe(made, source)
        if function is exchange.extremes:
            with fake_mode_of(self.graph):
                made.meta["val"] = source.meta["val"].new_empty((*shape_of(source)[:-1], 2))
        return made

    def _describe(self, made: fx.Node, source: fx.Node) -> None:
        made.meta["val"] = source.meta["val"]
        if PROVENANCE in source.meta:
            made.meta[PROVENANCE] = source.meta[PROVENANCE]

    def _record_shapes(self) -> None:
        """Record the shapes that values have on one rank."""
        with fake_mode_of(self.graph):
            for node, way in self.local.items():
                value = node.meta["val"]
                if isinstance(value, torch.Tensor):
                    shape = list(value.shape)
                    shape[way.axis] = way.whole // self.seat.size
                    node.meta["val"] = value.new_empty(shape)
            for node in self.local:
                if isinstance(node.meta["val"], (list, tuple)):
                    parts = {reader.args[1]: reader.meta["val"] for reader in node.users}
                    kept = enumerate(node.meta["val"])
                    node.meta["val"] = [parts.get(number, value) for number, value in kept]
