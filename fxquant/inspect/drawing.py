"""Draws the nodes of a module, before and after a pass, as a figure of matplotlib.

The layout is layered: a node is below everything that it reads, and near what it reads and what reads it. It suits
blocks of up to a few hundred nodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import networkx as nx

from fxquant.errors import UnknownNameError
from fxquant.inspect.history import Step
from fxquant.inspect.snapshots import NodeState
from fxquant.text import is_inside

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"added": "#1a7f37", "removed": "#cf222e", "rewired": "#9a6700", "tensor": "#8250df"}
"""The colours of changes, as in the inspector page."""
WIDTH, HEIGHT, GAP = 1.75, 0.42, 0.3
"""Size of a node and distance between layers, in inches."""
_SWEEPS = 8

Point = tuple[float, float]


def nodes_inside(nodes: Sequence[NodeState], module: str) -> list[NodeState]:
    """The nodes that the code of a module or of its parts made, without stored tensors.

    Raises:
        UnknownNameError: If no node is inside; the message names modules.
    """
    calls = [state for state in nodes if state.kind != "tensor"]
    inside = [state for state in calls if not module or is_inside(state.module, module)]
    if not inside:
        known = dict.fromkeys(state.module.rpartition(".")[0] or state.module for state in calls if state.module)
        raise UnknownNameError("module", module, list(known)[:12])
    return inside


@dataclass(frozen=True)
class Layout:
    """Where nodes and lines are, in inches; y grows downwards.

    Attributes:
        centres: Centres of the nodes by name.
        lines: Points of the line from one node to a reader, by their names.
    """

    centres: Mapping[str, Point]
    lines: Mapping[tuple[str, str], Sequence[Point]]

    @property
    def size(self) -> tuple[float, float]:
        """Width and height."""
        xs = [x for line in self.lines.values() for x, _ in line] + [x for x, _ in self.centres.values()]
        ys = [y for _, y in self.centres.values()]
        return max(xs) - min(xs) + WIDTH + 0.3, max(ys) - min(ys) + HEIGHT + 0.3


def layered(nodes: Sequence[NodeState]) -> Layout:
    """Place nodes in layers, and lead long lines past the nodes in between."""
    graph: nx.DiGraph[Any] = nx.DiGraph()
    names = {state.name for state in nodes}
    for state in nodes:
        graph.add_node(state.name)
        graph.add_edges_from((source, state.name) for source in state.inputs if source in names)
    rank = {name: number for number, layer in enumerate(nx.topological_generations(graph)) for name in layer}
    for name in list(graph):  # What reads nothing stands just above its first reader.
        if not graph.in_degree(name) and graph.out_degree(name):
            rank[name] = min(rank[reader] for reader in graph.successors(name)) - 1
    chains = {}
    for source, reader in list(graph.edges):
        between = [(source, reader, number) for number in range(rank[source] + 1, rank[reader])]
        chains[source, reader] = [source, *between, reader]
        graph.remove_edge(source, reader)
        nx.add_path(graph, chains[source, reader])
        rank.update({entry: entry[2] for entry in between})
    layers: list[list[Any]] = [[] for _ in range(max(rank.values()) + 1)]
    for name, number in rank.items():
        layers[number].append(name)
    place = _ordered(graph, layers)
    centres = {name: (place[name], number * (HEIGHT + GAP)) for name, number in rank.items()}
    lines = {}
    for (source, reader), path in chains.items():
        points = [(centres[entry][0], centres[entry][1] + side) for entry in path for side in (-HEIGHT / 2, HEIGHT / 2)]
        lines[source, reader] = points[1:-1]  # From the bottom of the one to the top of the other.
    return Layout({state.name: centres[state.name] for state in nodes}, lines)


def _ordered(graph: nx.DiGraph[Any], layers: Sequence[list[Any]]) -> dict[Any, float]:
    """The x of each entry: near the mean of those above and below it, in several sweeps."""
    place = {name: number * WIDTH for layer in layers for number, name in enumerate(layer)}
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        for layer in layers if down else reversed(layers):
            near = graph.predecessors if down else graph.successors
            beside = {name: [place[other] for other in near(name)] for name in layer}
            wanted = {name: sum(xs) / len(xs) if xs else place[name] for name, xs in beside.items()}
            layer.sort(key=wanted.__getitem__)
            place.update(_spread(layer, wanted))
    return place


def _spread(layer: Sequence[Any], wanted: Mapping[Any, float]) -> dict[Any, float]:
    """Ascending places near the wanted ones that leave room for each entry; a line needs little."""
    rooms = [WIDTH + 0.2 if isinstance(name, str) else 0.16 for name in layer]
    found, right = {}, float("-inf")
    for name, room in zip(layer, rooms, strict=True):
        found[name] = max(wanted[name], right + room / 2)
        right = found[name] + room / 2
    shift = sum(wanted[name] - found[name] for name in layer) / max(len(layer), 1)
    return {name: x + shift for name, x in found.items()}


def changes_of(step: Step) -> tuple[dict[str, str], dict[str, str]]:
    """How a pass changed nodes, by name: those before it (``removed``), and those after it."""
    folded = {change.tensor for change in step.tensors if change.what in ("folded", "replaced")}
    stored = {state.name: state.target for state in step.nodes if state.kind == "tensor"}
    after = {
        state.name: "tensor" for state in step.nodes if any(stored.get(source) in folded for source in state.inputs)
    }
    after |= {change.node: "rewired" for change in step.change.rewired}
    after |= dict.fromkeys(step.change.added, "added")
    return dict.fromkeys(step.change.removed, "removed"), after


def draw_nodes(axis: Axes, nodes: Sequence[NodeState], layout: Layout, changes: Mapping[str, str], module: str) -> None:
    """Draw nodes as boxes with their op, their layer and their value, and lines between them."""
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
    from matplotlib.path import Path

    for points in layout.lines.values():
        corners: Any = FancyArrowPatch(
            path=Path(points), arrowstyle="-|>", mutation_scale=5, linewidth=0.5, color="0.55", shrinkA=0, shrinkB=0
        )
        axis.add_patch(corners)
    for state in nodes:
        x, y = layout.centres[state.name]
        colour = COLOURS.get(changes.get(state.name, ""))
        corner = (x - WIDTH / 2, y - HEIGHT / 2)
        axis.add_patch(
            FancyBboxPatch(
                corner, WIDTH, HEIGHT, boxstyle="round,pad=0,rounding_size=0.05", linewidth=1.2 if colour else 0.6,
                edgecolor=colour or "0.6", facecolor=f"{colour}22" if colour else "white",
                linestyle="--" if changes.get(state.name) == "removed" else "-",
            )
        )  # fmt: skip
        op = state.target.partition("::")[2] or state.target if state.kind == "call" else state.kind
        place = (state.layer or state.module or state.name).removeprefix(f"{module}.")
        axis.text(x, y - 0.1, op.removesuffix(".default"), ha="center", va="center", fontsize=6.5, weight="bold")
        axis.text(x, y + 0.1, f"{place} {state.value}"[-42:], ha="center", va="center", fontsize=4.5, color="0.35")
    axis.set_axis_off()
    axis.set_aspect("equal")
    axis.set_anchor("N")
    axis.invert_yaxis()
    axis.autoscale_view()
