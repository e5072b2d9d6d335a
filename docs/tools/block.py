"""Draws one transformer block of a graph: a box per op, from the conditioning at the top to the block's output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import networkx as nx
from torch import fx

from fxquant.ir.histories import history_of
from fxquant.ir.meta import LAYER, PROVENANCE
from fxquant.ir.names import op_name

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

_LEFT_OUT = ("view", "reshape", "transpose", "unsqueeze", "chunk", "unbind", "cat", "slice", "squeeze")
"""Ops that only move values. They are not drawn; an edge goes through them."""

COLOURS = {"float": "#e8eaf0", "changed": "#ffd9a0", "inserted": "#b9e4bb", "integer": "#b5d4f7"}
"""Kinds of boxes: as captured; its weights were changed; inserted by a pass; computes with integers."""

_LEGEND = {"float": "as captured", "changed": "weights changed", "inserted": "inserted", "integer": "integers"}

_WIDTH, _HEIGHT = 1.55, 0.62
_COLUMN = 1.85
_RIGHT = 2.75  # Where residual connections pass.
_LEFT = -5.0  # Where the parts of the modulation leave their linear.


@dataclass
class Box:
    """One op of a block.

    Attributes:
        title: The op.
        detail: Its layer, if it has one, without the name of the block.
        kind: A key of :data:`COLOURS`.
        vector: Whether its value has no tokens, such as the modulation of a block.
        order: Position in the graph.
    """

    title: str
    detail: str
    kind: str
    vector: bool
    order: int
    x: float = 0.0
    y: float = field(default=0.0)


def boxes_of(module: fx.GraphModule, block: str) -> nx.DiGraph:
    """The ops of a block as a graph of :class:`Box` by node name.

    Args:
        module: A graph of any stage.
        block: The block's name, such as ``transformer_blocks.0``.
    """
    nodes = list(module.graph.nodes)
    own = [node for node in nodes if str(node.meta.get(LAYER, "")).startswith(f"{block}.")]
    inside = [node for node in own if ".emb." not in node.meta[LAYER]]
    codes = [node for node in inside[0].all_input_nodes if op_name(node.target).startswith("fxquant::quantize")]
    first, last = min(map(nodes.index, [inside[0], *codes])), max(map(nodes.index, inside))
    ends = [node for node in nodes[last:] if op_name(node.target).startswith("add")]  # The residual sum after it.
    span = [node for node in nodes[first : nodes.index(ends[0]) + 1] if node.op == "call_function"]
    graph = nx.DiGraph()
    for order, node in enumerate(span):
        if _short(node) not in _LEFT_OUT:
            graph.add_node(node.name, box=_box(module, node, block, order))
    for node in span:
        if node.name not in graph:
            continue
        for origin in {origin for source in node.all_input_nodes for origin in _origins(source)}:
            if origin.name not in graph:
                title = "input of the block" if _has_tokens(origin) else "conditioning"
                graph.add_node(origin.name, box=Box(title, "", "float", not _has_tokens(origin), -1))
            graph.add_edge(origin.name, node.name)
    _place(graph)
    return graph


def _short(node: fx.Node) -> str:
    return op_name(node.target).partition(".")[0].removeprefix("fxquant::")


def _origins(node: fx.Node) -> Sequence[fx.Node]:
    """The drawn nodes that a value comes from: tensors, without parameters and numbers."""
    if node.op != "call_function" or _short(node).startswith("sym_size"):
        return []
    return _origins(node.all_input_nodes[0]) if _short(node) in _LEFT_OUT else [node]


def _has_tokens(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return getattr(value, "ndim", 0) >= 3 and value.shape[-2] != 1


def _box(module: fx.GraphModule, node: fx.Node, block: str, order: int) -> Box:
    op = op_name(node.target).partition(".")[0]
    read = [source for source in node.all_input_nodes if source.op == "get_attr"]
    kind = "float"
    if op in ("fxquant::linear", "fxquant::quantize", "fxquant::matmul"):
        kind = "integer"
    elif node.meta.get(PROVENANCE):
        kind = "inserted"
    elif any(history_of(module, source).steps for source in read):
        kind = "changed"
    detail = str(node.meta.get(LAYER, "")).removeprefix(f"{block}.") if "linear" in op else ""
    if op == "add" and len(node.all_input_nodes) == 1:
        op = f"add {node.args[1]}"
    if op == "getitem":
        op = f"part {node.args[1]}"
    return Box(op.removeprefix("aten::").replace("scaled_dot_product_", ""), detail, kind, not _has_tokens(node), order)


def _place(graph: nx.DiGraph) -> None:
    """Place each box.

    Ops on tokens stand below each other, by the longest path. Those on vectors, such as the modulation, stand to the
    left of the op on tokens that reads them; what makes them stands on top.
    """
    box = {name: graph.nodes[name]["box"] for name in graph}
    tokens = graph.subgraph([name for name in graph if not box[name].vector])
    rows: dict[str, int] = {}
    for name in nx.topological_sort(tokens):
        rows[name] = max((rows[before] + 1 for before in tokens.predecessors(name)), default=0)
    for row in set(rows.values()):
        names = sorted((name for name in rows if rows[name] == row), key=lambda name: box[name].order)
        for number, name in enumerate(names):
            box[name].x, box[name].y = (number - (len(names) - 1) / 2) * 1.75, -float(row)
    order = list(nx.topological_sort(graph))
    for name in reversed(order):
        readers = [box[reader] for reader in graph.successors(name)]
        if box[name].vector and len(readers) == 1:
            box[name].x, box[name].y = min(readers[0].x, 0.0) - _COLUMN, readers[0].y
    above = [name for name in order if box[name].vector and _makes_parts(graph, box, name)]
    for number, name in enumerate(reversed(above)):
        box[name].x, box[name].y = _LEFT + _WIDTH / 2, 1.0 + number


def _makes_parts(graph: nx.DiGraph, box: dict[str, Box], name: str) -> bool:
    """Whether a vector is split into parts, or leads to such a vector."""
    readers = list(graph.successors(name))
    return len(readers) > 1 or (len(readers) == 1 and box[readers[0]].vector and _makes_parts(graph, box, readers[0]))


def draw(graph: nx.DiGraph, path: Path, title: str) -> None:
    """Write the picture of a block as SVG."""
    boxes: list[Box] = [data["box"] for _, data in graph.nodes(data=True)]
    low, high = min(box.y for box in boxes), max(box.y for box in boxes)
    with pyplot.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fxquant", "font.family": "DejaVu Sans"}):
        figure, axis = pyplot.subplots(figsize=(7.4, (high - low + 2.2) * 0.47))
        for source, reader in graph.edges:
            _arrow(axis, graph.nodes[source]["box"], graph.nodes[reader]["box"])
        for box in boxes:
            _draw_box(axis, box)
        for number, (kind, colour) in enumerate(COLOURS.items()):
            axis.scatter(-4.4 + 1.9 * number, low - 0.95, marker="s", s=70, color=colour, edgecolor="#666666")
            axis.text(-4.22 + 1.9 * number, low - 0.95, _LEGEND[kind], fontsize=7.5, va="center")
        axis.set_title(title, fontsize=10)
        axis.set_xlim(_LEFT - 0.2, _RIGHT + 0.15)
        axis.set_ylim(low - 1.3, high + 0.5)
        axis.axis("off")
        figure.tight_layout(pad=0.4)
        figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})
        pyplot.close(figure)


def _draw_box(axis: pyplot.Axes, box: Box) -> None:
    corner = (box.x - _WIDTH / 2, box.y - _HEIGHT / 2)
    style = "round,pad=0,rounding_size=0.1"
    shape = FancyBboxPatch(corner, _WIDTH, _HEIGHT, style, facecolor=COLOURS[box.kind], edgecolor="#555555", lw=0.8)
    axis.add_patch(shape)
    axis.text(box.x, box.y + (0.11 if box.detail else 0), box.title, ha="center", va="center", fontsize=8)
    if box.detail:
        axis.text(box.x, box.y - 0.13, box.detail, ha="center", va="center", fontsize=6.5, color="#333333")


def _arrow(axis: pyplot.Axes, source: Box, reader: Box) -> None:
    half = _WIDTH / 2
    if source.vector and (not reader.vector or source.y == reader.y):
        points = [(source.x + half, source.y), (reader.x - half, reader.y)]
    elif source.vector and source.x != reader.x:  # To a part of the modulation.
        points = [(_LEFT + 0.15, source.y - _HEIGHT / 2), (_LEFT + 0.15, reader.y), (reader.x - half, reader.y)]
    elif source.y - reader.y > 1.5:  # A residual connection, to the right of the boxes between.
        start, end = source.y - 0.12, reader.y + 0.12
        points = [(source.x + half, start), (_RIGHT, start), (_RIGHT, end), (reader.x + half, end)]
    else:
        points = [(source.x, source.y - _HEIGHT / 2), (reader.x, reader.y + _HEIGHT / 2)]
    axis.plot(*zip(*points[:-1], strict=True), color="#777777", lw=0.8, zorder=0)
    line = FancyArrowPatch(
        points[-2], points[-1], arrowstyle="-|>", mutation_scale=7, color="#777777", lw=0.8, shrinkA=0, shrinkB=0
    )
    axis.add_patch(line)
