"""Splitting a graph into segments that can run one after the other: its blocks, and the nodes between blocks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

_BLOCK = re.compile(r"^(.*?\.\d+)(?:\.|$)")


@dataclass(frozen=True, eq=False)
class Segment:
    """A run of neighbouring nodes.

    Attributes:
        name: Module path of the block, such as ``transformer_blocks.3``; ``before``, ``between`` or ``behind`` for
            nodes that belong to no block. If several segments have one name, the second and later names end in ``@``
            and a number.
        nodes: The nodes that compute, in order; inputs and parameters of the graph are in no segment.
        inputs: Values that it reads and does not make, without parameters.
        outputs: Values that it makes and that later nodes read.
        freed: By node, the values that nothing reads any more when this node has run.
    """

    name: str
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    freed: Mapping[fx.Node, tuple[fx.Node, ...]]


def segments(graph: fx.Graph, also_read: Callable[[fx.Node], Iterable[fx.Node]] = lambda node: ()) -> list[Segment]:
    """The segments of a graph, in order; each of its ops is in exactly one.

    A segment is an interval of the graph, so nothing in it depends on what comes later. A block that occurs again has a
    segment for each occurrence, for example a block whose embedder is called once more after all blocks.

    Args:
        graph: The graph.
        also_read: Earlier nodes whose values are needed when a node runs, besides its arguments.
    """
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    runs: list[tuple[str, int, int]] = []  # Name, first and last position.
    for position, node in enumerate(nodes):
        block = block_of(node)
        if block is None:
            continue
        if runs and runs[-1][0] == block:
            runs[-1] = (block, runs[-1][1], position)
        else:
            runs.append((block, position, position))
    found: list[tuple[str, list[fx.Node]]] = []
    position, seen = 0, Counter[str]()
    for name, first, last in runs:
        if position < first:
            found.append(("between" if found else "before", nodes[position:first]))
        found.append((name, nodes[first : last + 1]))
        position = last + 1
    if position < len(nodes):
        found.append(("behind", nodes[position:]))
    reads = {node: _unique((*node.all_input_nodes, *also_read(node))) for node in graph.nodes}
    last_reader = {source: node for node, sources in reads.items() for source in sources}
    parts = []
    for name, own in found:
        seen[name] += 1
        parts.append(_segment(name if seen[name] == 1 else f"{name}@{seen[name]}", own, reads, last_reader))
    return parts


def whole(graph: fx.Graph) -> Segment:
    """All ops of a graph as one segment."""
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    reads = {node: _unique(node.all_input_nodes) for node in nodes}
    return _segment("whole", nodes, reads, {source: node for node in nodes for source in reads[node]})


def block_of(node: fx.Node) -> str | None:
    """The repeated block that a node belongs to: the first part of its module path that ends in a number."""
    paths = [str(path) for path, _ in node.meta.get("nn_module_stack", {}).values()]
    match = _BLOCK.match(paths[-1]) if paths else None
    return match[1] if match else None


def _segment(
    name: str,
    nodes: Sequence[fx.Node],
    reads: Mapping[fx.Node, tuple[fx.Node, ...]],
    last_reader: Mapping[fx.Node, fx.Node],
) -> Segment:
    """A segment, from what each node of the graph reads and from the last node that reads each value."""
    own = set(nodes)
    sources = _unique(source for node in nodes for source in reads[node])
    inputs = tuple(source for source in sources if source not in own and source.op != "get_attr")
    outputs = tuple(node for node in nodes if node in last_reader and last_reader[node] not in own)
    last_here = {source: node for node in nodes for source in reads[node] if source not in outputs}
    freed: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for source, node in last_here.items():
        freed[node] = (*freed.get(node, ()), source)
    return Segment(name, tuple(nodes), inputs, outputs, freed)


def _unique(nodes: Iterable[fx.Node]) -> tuple[fx.Node, ...]:
    return tuple(dict.fromkeys(nodes))
