"""A graph, or a part of it, as text, DOT, networkx, node-link JSON, or the JSON of Model Explorer."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import networkx as nx

from fxquant.inspect import alignment
from fxquant.inspect.history import History
from fxquant.inspect.snapshots import NodeState, Snapshot
from fxquant.text import is_inside, json_values

_COLOURS = {
    "product": "#c6dbef",
    "quantize": "#fdd0a2",
    "dequantize": "#fdd0a2",
    "balance": "#c7e9c0",
    "shift": "#c7e9c0",
    "observe": "#dadaeb",
}
"""Fill colours of nodes in DOT, by role. Nodes without a role are white, and stored tensors are grey."""


def part_of(
    history: History, after: str | None = None, block: str | int | None = None, layer: str | None = None
) -> Snapshot:
    """The nodes of a graph after a step, or those of a part of the model.

    Args:
        history: The history of the graph.
        after: Name of a step: ``captured``, a pass, or ``lower``. By default the last one.
        block: Number of a block, such as 3, or its path; None for all.
        layer: Name of a layer, or path of a module; None for all.

    Raises:
        UnknownNameError: If there is no such step, block or layer. The message names the nearest ones.
    """
    nodes = (history.steps[-1] if after is None else history.step(after)).nodes
    return alignment.part_of(nodes, None if block is None else str(block), layer)


def to_text(nodes: Snapshot) -> str:
    """One line per node: ``name: dtype[shape] = op(arguments)  # role of layer; passes; line of code``."""
    targets = {f"%{state.name}": f"@{state.target}" for state in nodes if state.kind == "tensor"}
    lines = []
    for state in nodes:
        if state.kind == "tensor":
            continue
        value = f": {state.value}" if state.value else ""
        given = ", ".join(f"{name}={_shown(value, targets)}" for name, value in state.arguments.items())
        op = state.target.removeprefix("aten::")
        line = {"call": f"{state.name}{value} = {op}({given})", "input": f"{state.name}{value}"}
        notes = [f"{role} of {layer}" for layer, role in state.roles.items()]
        notes += ["by " + ", ".join(dict.fromkeys(name for name, _ in state.made_by))] if state.made_by else []
        notes += [state.source] if state.source else []
        text = line.get(state.kind, f"return {_shown(state.arguments.get('values'), targets)}")
        lines.append(f"{text}  # {'; '.join(notes)}" if notes else text)
    return "\n".join(lines)


def _shown(value: Any, targets: Mapping[str, str]) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_shown(item, targets) for item in value) + "]"
    return targets.get(value, value.removeprefix("%")) if isinstance(value, str) else str(value)


def to_networkx(nodes: Snapshot) -> nx.MultiDiGraph[str]:
    """The graph for networkx: node attributes are those of :class:`NodeState`, and an edge names the argument.

    Nodes outside of the part that it reads are nodes with the attribute ``outside``.
    """
    graph: nx.MultiDiGraph[str] = nx.MultiDiGraph()
    for state in nodes:
        graph.add_node(state.name, **state.to_json())
    for state in nodes:
        for source, argument in _reads(state):
            if source not in graph:
                graph.add_node(source, name=source, outside=True)
            graph.add_edge(source, state.name, argument=argument)
    return graph


def _reads(state: NodeState) -> list[tuple[str, str]]:
    found = []
    for name, value in state.arguments.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, str) and item.startswith("%") and item[1:] in state.inputs:
                found.append((item[1:], name))
    return found


def to_json(nodes: Snapshot) -> dict[str, Any]:
    """The graph as node-link data (:func:`networkx.node_link_data`), with the lists ``nodes`` and ``edges``."""
    data = json_values(nx.node_link_data(to_networkx(nodes), edges="edges"))
    assert isinstance(data, dict)
    return data


def to_dot(nodes: Snapshot) -> str:
    """The graph for Graphviz, one cluster per module: ``dot -Tsvg graph.dot -o graph.svg``.

    A node shows its op, dtype and shape, bits, its role in its layers, and the stored tensors that it reads. Paths are
    relative to the innermost module that holds all nodes, which the graph is titled by. The tooltip, which SVG has,
    is the node's line in :func:`to_text`.
    """
    stored = {state.name: state for state in nodes if state.kind == "tensor"}
    read = {source for state in nodes if state.kind != "tensor" for source in state.inputs}
    shown = [state for state in nodes if state.name not in stored or state.name not in read]
    root = _common_module(shown)
    modules: dict[str, list[NodeState]] = {}
    for state in shown:
        modules.setdefault(state.module, []).append(state)
    lines = [
        f'digraph {{ label={_quoted(root)}; labelloc=t; ranksep=0.25; fontname="sans-serif"; fontsize=12;',
        '  node [shape=box style=filled fillcolor=white fontname="sans-serif" fontsize=10 height=0.3];',
        '  edge [fontname="sans-serif" fontsize=8 arrowsize=0.6];',
    ]
    for number, (module, states) in enumerate(modules.items()):
        title = _inside(module, root)
        if title:
            lines.append(f"  subgraph cluster_{number} {{ label={_quoted(title)}; color=gray;")
        lines += [f"    {_quoted(state.name)} [{_dot_attributes(state, stored, root)}];" for state in states]
        if title:
            lines.append("  }")
    drawn = {state.name for state in shown}
    outside: dict[str, None] = {}
    edges = []
    for state in shown:
        reads = [(source, argument) for source, argument in _reads(state) if source not in stored]
        outside |= dict.fromkeys(source for source, _ in reads if source not in drawn)
        for source, argument in reads:  # Names distinguish arguments; a single one needs none.
            label = f" [label={_quoted(argument)}]" if len(reads) > 1 else ""
            edges.append(f"  {_quoted(source)} -> {_quoted(state.name)}{label};")
    lines += [f"  {_quoted(name)} [style=dashed];" for name in outside] + edges
    return "\n".join([*lines, "}"]) + "\n"


def _common_module(nodes: Iterable[NodeState]) -> str:
    paths = [state.module.replace(".", "/") for state in nodes if state.module]
    return posixpath.commonpath(paths).replace("/", ".") if paths else ""


def _inside(path: str, root: str) -> str:
    """A path relative to a module that it is inside, or the path itself."""
    return path[len(root) :].removeprefix(".") if root and is_inside(path, root) else path


def _dot_attributes(state: NodeState, stored: Mapping[str, NodeState], root: str) -> str:
    lines = [state.target.removeprefix("aten::"), state.value, "" if state.bits is None else f"{state.bits} bits"]
    lines += [f"{role} of {_inside(layer, root) or layer}" for layer, role in state.roles.items()]
    lines += [f"{name}: {stored[source].value}" for source, name in _reads(state) if source in stored]
    colours = (_COLOURS[role] for role in state.roles.values() if role in _COLOURS)
    colour = "#eeeeee" if state.kind == "tensor" else next(colours, "white")
    tooltip = to_text((*stored.values(), state)) or state.name
    label = "\n".join(filter(None, lines))
    return f"label={_quoted(label)} fillcolor={_quoted(colour)} tooltip={_quoted(tooltip)}"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def to_model_explorer(nodes: Snapshot, label: str = "fxquant") -> dict[str, Any]:
    """The graph in the JSON format of Model Explorer, whose layers are the modules of the model.

    Args:
        nodes: The nodes.
        label: Name of the graph.
    """
    graph = to_networkx(nodes)
    states = {state.name: state for state in nodes}
    found = []
    for name in graph:
        state = states.get(name)
        edges = [
            {"sourceNodeId": source, "sourceNodeOutputId": "0", "targetNodeInputId": str(number)}
            for number, (source, _, _) in enumerate(graph.in_edges(name, data="argument"))
        ]
        entry: dict[str, Any] = {
            "id": name,
            "label": name if state is None else state.target.removeprefix("aten::"),
            "namespace": "" if state is None else state.module.replace(".", "/"),
            "attrs": [] if state is None else _attributes(state),
            "incomingEdges": edges,
        }
        if state is not None and state.value:
            entry["outputsMetadata"] = [{"id": "0", "attrs": [{"key": "tensor_shape", "value": state.value}]}]
        found.append(entry)
    return {"label": label, "graphs": [{"id": label, "nodes": found}]}


def _attributes(state: NodeState) -> list[dict[str, str]]:
    skipped = ("name", "kind", "target", "inputs", "shape", "dtype", "module")
    values = {key: value for key, value in state.to_json().items() if key not in skipped}
    return [
        {"key": key, "value": value if isinstance(value, str) else json.dumps(value)} for key, value in values.items()
    ]


FORMATS: dict[str, Callable[[Snapshot], str]] = {
    "text": lambda nodes: to_text(nodes) + "\n",
    "dot": to_dot,
    "json": lambda nodes: json.dumps(json_values([state.to_json() for state in nodes]), indent=1) + "\n",
    "networkx": lambda nodes: json.dumps(to_json(nodes), indent=1) + "\n",
    "model-explorer": lambda nodes: json.dumps(to_model_explorer(nodes), indent=1) + "\n",
}
"""Text of a graph in each format. ``networkx`` is node-link JSON, which :func:`networkx.node_link_graph` reads."""
