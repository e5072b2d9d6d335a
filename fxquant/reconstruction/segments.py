"""Splitting a graph into segments that can run one after the other: its blocks, and the nodes between blocks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
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
    """

    name: str
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


def segments(graph: fx.Graph) -> list[Segment]:
    """The segments of a graph, in order; each of its ops is in exactly one.

    A segment is an interval of the graph, so nothing in it depends on what comes later. A block that occurs again has a
    segment for each occurrence, for example a block whose embedder is called once more after all blocks.
    """
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    runs: list[tuple[str, int, int]] = []  # Name, first and last position.
    for position, node in enumerate(nodes):
        block = _block_of(node)
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
    parts = []
    for name, own in found:
        seen[name] += 1
        parts.append(_segment(name if seen[name] == 1 else f"{name}@{seen[name]}", own))
    return parts


def _block_of(node: fx.Node) -> str | None:
    """The repeated block that a node belongs to: the first part of its module path that ends in a number."""
    paths = [str(path) for path, _ in node.meta.get("nn_module_stack", {}).values()]
    match = _BLOCK.match(paths[-1]) if paths else None
    return match[1] if match else None


def _segment(name: str, nodes: Sequence[fx.Node]) -> Segment:
    own = set(nodes)
    sources = (source for node in nodes for source in node.all_input_nodes)
    inputs = _unique(source for source in sources if source not in own and source.op != "get_attr")
    outputs = tuple(node for node in nodes if any(user not in own for user in node.users))
    return Segment(name, tuple(nodes), inputs, outputs)


def _unique(nodes: Iterable[fx.Node]) -> tuple[fx.Node, ...]:
    return tuple(dict.fromkeys(nodes))
