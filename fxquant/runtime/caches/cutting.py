"""Cuts a graph in parts that run one after the other, where one of them can be left out.

A cut has three parts. The *head* computes the values that decide, and all else that the others read. The *middle*
computes the results that can be reused. The *tail* computes the outputs from these results::

    inputs -> head -> middle -> results -> tail -> outputs

The parts are graphs over the tensors of the whole graph, and each op is in exactly one. So head, middle and tail
together compute the same bits as the whole graph.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

PART = "fxquant_part"
"""Key of the ``meta`` of a graph module that is a part of a graph."""

Run = Callable[[fx.GraphModule, Sequence[Any]], Sequence[Any]]
"""Runs a graph for its inputs."""


@dataclass(frozen=True, eq=False)
class Part:
    """A part of a graph.

    Attributes:
        module: The part as a graph of its own.
        given: The nodes of the whole graph whose values it gets, one for each placeholder.
        made: The nodes of the whole graph whose values it returns.
    """

    module: fx.GraphModule
    given: tuple[fx.Node, ...]
    made: tuple[fx.Node, ...]

    def run(self, values: Mapping[fx.Node, Any], run: Run) -> dict[fx.Node, Any]:
        """The values that it makes, by node of the whole graph."""
        made = run(self.module, [values[node] for node in self.given])
        return dict(zip(self.made, made, strict=True))


@dataclass(frozen=True, eq=False)
class Cut:
    """A graph in parts; see the module.

    Attributes:
        inputs: The placeholders of the whole graph.
        head: The ops that compute the sources, and those whose values both other parts read.
        middle: The ops that compute the results from the sources.
        tail: The ops that compute the outputs.
        outputs: The outputs of the whole graph, with nodes in place of values.
        bypassing: Nodes of the head and the tail that depend on the sources, and not by way of the results.
    """

    inputs: tuple[fx.Node, ...]
    head: Part
    middle: Part
    tail: Part
    outputs: Any
    bypassing: tuple[fx.Node, ...]

    def leaves(self, values: Mapping[fx.Node, Any], run: Run) -> tuple[Any, ...]:
        """The outputs of the whole graph, from its inputs, the values of the head and the results."""
        known = {**values, **self.tail.run(values, run)}
        found: Any = fx.node.map_arg(self.outputs, known.__getitem__)
        return tuple(found)


def cut(
    module: fx.GraphModule, sources: Sequence[fx.Node], results: Sequence[fx.Node], further: Sequence[fx.Node] = ()
) -> Cut:
    """Cut a graph.

    Args:
        module: The graph. The parts read its tensors, also after they were moved.
        sources: Values that the head makes.
        results: Values that the middle makes.
        further: Other values that the head makes.
    """
    graph = module.graph
    output = graph.output_node()
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    head = _needed([*sources, *further])
    tail = _needed(output.all_input_nodes, known={*head, *results})
    middle = _needed(results, known=head)
    head |= middle & tail
    middle -= head
    tail -= head
    parts: list[Part] = []
    known = dict.fromkeys(inputs)
    for nodes, wanted in ((head, [*sources, *further]), (middle, results), (tail, output.all_input_nodes)):
        own = [node for node in graph.nodes if node in nodes and node.op not in ("placeholder", "get_attr")]
        others = {node for part in (head, middle, tail) if part is not nodes for node in part}
        made = dict.fromkeys((*wanted, *(node for node in own if any(user in others for user in node.users))))
        part = _part(module, own, [node for node in made if node not in known])
        parts.append(part)
        known.update(dict.fromkeys(part.made))
    passing = dependent(graph, sources, results)
    bypassing = tuple(node for node in graph.nodes if node in passing and node in head | tail)
    return Cut(tuple(inputs), parts[0], parts[1], parts[2], output.args[0], bypassing)


def part(module: fx.GraphModule, wanted: Sequence[fx.Node], known: Sequence[fx.Node] = ()) -> Part:
    """The part of a graph that computes some values from its inputs and from other values.

    Args:
        module: The graph. The part reads its tensors, also after they were moved.
        wanted: Values that the part makes.
        known: Values that it is given.
    """
    nodes = _needed(wanted, known=set(known))
    own = [node for node in module.graph.nodes if node in nodes and node.op not in ("placeholder", "get_attr")]
    made = dict.fromkeys(node for node in wanted if node.op != "placeholder" and node not in known)
    return _part(module, own, list(made))


def _needed(wanted: Iterable[fx.Node], known: Container[fx.Node] = ()) -> set[fx.Node]:
    """The nodes that compute some values, these included, without those that are known."""
    found: set[fx.Node] = set()
    stack = list(wanted)
    while stack:
        node = stack.pop()
        if node not in found and node not in known:
            found.add(node)
            stack += node.all_input_nodes
    return found


def dependent(graph: fx.Graph, sources: Iterable[fx.Node], results: Container[fx.Node] = ()) -> set[fx.Node]:
    """The nodes that depend on a source, and not only by way of a result. A source may depend on another."""
    found = set(sources)
    for node in graph.nodes:
        if node not in results and any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found.difference(sources)


def _part(module: fx.GraphModule, own: Sequence[fx.Node], made: Sequence[fx.Node]) -> Part:
    """The part of a graph that consists of some of its ops, in order, and that returns some of its values."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    inside = set(own)
    read = dict.fromkeys(source for node in own for source in node.all_input_nodes)
    given = [node for node in read if node not in inside and node.op != "get_attr"]
    for node in given:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = copy.copy(node.meta)
    for node in (*(node for node in (*read, *made) if node.op == "get_attr"), *own):
        if node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in made))
    part = fx.GraphModule(module, graph, class_name=type(module).__name__)
    for kind in ("_parameters", "_buffers", "_modules"):  # A model that moves replaces the tensors in these dicts.
        vars(part)[kind] = vars(module)[kind]
    part.meta[PART] = True
    return Part(part, tuple(given), tuple(made))
