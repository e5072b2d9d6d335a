"""Snapshots: what a graph is at one moment, as plain values that stay the same when the graph changes.

Snapshots hold no tensors and no nodes. Nodes that did not change between two snapshots are the same objects in both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.disk.files import dtype_of_name
from fxquant.ir.arguments import args
from fxquant.ir.meta import LAYER, PROVENANCE
from fxquant.ir.names import qualified_name
from fxquant.ir.roles import assign_roles, module_path, roles_of
from fxquant.ir.source_lines import source_line
from fxquant.numerics.formats import FORMATS

_KINDS = {"call_function": "call", "get_attr": "tensor", "placeholder": "input", "output": "output"}
BATCH = "B"
"""An open size in a shape: the batch size, or a multiple of it."""


@dataclass(frozen=True)
class NodeState:
    """One node.

    Attributes:
        name: Its name in the graph.
        kind: ``call``, ``tensor`` (it reads a stored tensor), ``input`` or ``output``.
        target: The op with its namespace and overload, such as ``aten::linear``; the name of the tensor or input.
        arguments: The arguments by the names of the op's schema; nodes as their names after ``%``.
        inputs: Names of the nodes that it reads, each once.
        shape: Shape of its value; an open size is text. None if the value is not one tensor.
        dtype: Dtype of its value, such as ``float32``; None if the value is not one tensor.
        layer: The layer that it works for, by ``node.meta["fxquant_layer"]``, or None.
        roles: The layers that it belongs to, with its role in each (:mod:`fxquant.ir.roles`).
        module: Path of the module whose code made it; empty for the model itself.
        module_class: Class of that module, such as ``diffusers.models.attention.FeedForward``.
        source: The line of the model's code, such as ``diffusers/models/attention.py:12 in forward: x = ...``.
        made_by: The passes that made it and the nodes that they made it from, the oldest first; empty if captured.
    """

    name: str
    kind: str
    target: str
    arguments: Mapping[str, Any]
    inputs: tuple[str, ...]
    shape: tuple[int | str, ...] | None
    dtype: str | None
    layer: str | None
    roles: Mapping[str, str]
    module: str
    module_class: str
    source: str | None
    made_by: tuple[tuple[str, tuple[str, ...]], ...]

    @property
    def bits(self) -> int | None:
        """Bits of the codes that it makes or multiplies with; None for other nodes."""
        # Of a product, the bits of the weight. Other ops and graphs dumped by earlier versions state bits or ends.
        named = (self.arguments.get(key) for key in ("w_format", "format"))
        format = next((name for name in named if isinstance(name, str)), None)
        if format is not None:
            return FORMATS[format].bits if format in FORMATS else None
        bits, top = self.arguments.get("bits"), self.arguments.get("qmax", self.arguments.get("quant_max"))
        if isinstance(bits, int):
            return bits
        if not isinstance(top, int):
            return None
        low = self.arguments.get("qmin", self.arguments.get("quant_min", 0))
        return int(top - (low if isinstance(low, int) else 0)).bit_length()

    @property
    def value(self) -> str:
        """Dtype and shape of its value as text, such as ``float32[B, 16]``; empty if the value is not one tensor."""
        return "" if self.dtype is None else f"{self.dtype}[{', '.join(map(str, self.shape or ()))}]"

    @property
    def num_bytes(self) -> int | None:
        """Bytes of its value; None if a size is open, or the value is not one tensor."""
        if self.dtype is None or self.shape is None:
            return None
        sizes = [size for size in self.shape if isinstance(size, int)]
        return dtype_of_name(self.dtype).itemsize * math.prod(sizes) if len(sizes) == len(self.shape) else None

    def reads_like(self, other: NodeState) -> bool:
        """Whether two nodes compute the same from nodes of the same names."""
        return (self.target, self.arguments) == (other.target, other.arguments)

    def to_json(self) -> dict[str, Any]:
        """The node as JSON values, without entries that are empty."""
        data = {**asdict(self), "bits": self.bits}
        data["made_by"] = [[name, list(sources)] for name, sources in self.made_by]
        return {key: value for key, value in data.items() if value not in (None, "", {}, [], ())}


Snapshot = tuple[NodeState, ...]
"""The nodes of a graph, in order."""


def snapshot(module: fx.GraphModule, before: Mapping[str, NodeState] | None = None) -> Snapshot:
    """The nodes of a graph as they are now.

    Args:
        module: The graph.
        before: Nodes of an earlier snapshot by name; nodes that are still equal are taken from it.
    """
    assign_roles(module.graph)
    modules = _modules_by_path(module.graph)
    states = []
    for node in module.graph.nodes:
        state = _state(node, modules)
        known = None if before is None else before.get(node.name)
        states.append(known if known is not None and known == state else state)
    return tuple(states)


def _modules_by_path(graph: fx.Graph) -> dict[str, str]:
    """The class of each module whose code made nodes, by path."""
    found: dict[str, str] = {}
    for node in graph.nodes:
        for path, kind in node.meta.get("nn_module_stack", {}).values():
            found[str(path)] = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
    return found


def _state(node: fx.Node, modules: Mapping[str, str]) -> NodeState:
    path = _owner(node, modules) if node.op == "get_attr" else module_path(node)
    line, recorded = source_line(node), node.meta.get("val")
    value = recorded if isinstance(recorded, Tensor) else None
    return NodeState(
        name=node.name,
        kind=_KINDS.get(node.op, node.op),
        target=qualified_name(node.target) if node.op == "call_function" else str(node.target),
        arguments=_arguments(node),
        inputs=tuple(read.name for read in node.all_input_nodes),
        shape=None if value is None else tuple(_size(size) for size in value.shape),
        dtype=None if value is None else str(value.dtype).removeprefix("torch."),
        layer=None if LAYER not in node.meta else str(node.meta[LAYER]),
        roles=dict(roles_of(node)),
        module=path,
        module_class=modules.get(path, "") if node.op in ("call_function", "get_attr") else "",
        source=None if line is None else str(line),
        made_by=tuple((origin.pass_name, tuple(origin.sources)) for origin in node.meta.get(PROVENANCE, ())),
    )


def _owner(node: fx.Node, modules: Mapping[str, str]) -> str:
    """Path of the module that holds a tensor; for tensors that passes made, the nearest module above."""
    path = str(node.target).rpartition(".")[0]
    while path and path not in modules:
        path = path.rpartition(".")[0]
    return path


def _arguments(node: fx.Node) -> dict[str, Any]:
    if node.op == "output":
        return {"values": _plain(node.args[0] if node.args else None)}
    if node.op != "call_function":
        return {}
    if isinstance(node.target, torch._ops.OpOverload):
        given = {name: value for name, value in args(node).by_name().items() if args(node).gives(name)}
    else:
        given = {**{f"arg{number}": value for number, value in enumerate(node.args)}, **node.kwargs}
    return {name: _plain(value) for name, value in given.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and abs(value) < 1e300):
        return value
    return str(value).removeprefix("torch.")


def _size(size: int | torch.SymInt) -> int | str:
    """A size. The only open number of a graph is its batch size, which traces call ``s`` and a number."""
    if isinstance(size, int):
        return size
    text = str(size)
    return BATCH if text.startswith("s") and text[1:].isdigit() else text


@dataclass(frozen=True)
class Rewired:
    """A node that reads other nodes than before, or has other options.

    Attributes:
        node: Its name.
        before: The arguments that changed, as they were.
        after: The arguments that changed, as they are.
    """

    node: str
    before: Mapping[str, Any]
    after: Mapping[str, Any]


@dataclass(frozen=True)
class GraphChange:
    """What differs between two snapshots of one graph, by the names of nodes.

    Attributes:
        added: Names of the nodes that only the later one has.
        removed: Names of the nodes that only the earlier one has.
        rewired: Nodes that both have, with other arguments.
        replaced: For each removed node that a pass made other nodes from: the names of these nodes.
    """

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    rewired: tuple[Rewired, ...] = ()
    replaced: Mapping[str, tuple[str, ...]] | None = None


def change_between(before: Snapshot, after: Snapshot) -> GraphChange:
    """Compare two snapshots of one graph, the earlier one first."""
    old, new = {state.name: state for state in before}, {state.name: state for state in after}
    added = [state for state in after if state.name not in old]
    removed = [state.name for state in before if state.name not in new]
    rewired = [
        _rewired(old[state.name], state)
        for state in after
        if state.name in old and state is not old[state.name] and not state.reads_like(old[state.name])
    ]
    replaced: dict[str, list[str]] = {}
    for state in added:
        for source in state.made_by[-1][1] if state.made_by else ():
            if source in old and source not in new and state.name not in replaced.setdefault(source, []):
                replaced[source].append(state.name)
    return GraphChange(
        tuple(state.name for state in added),
        tuple(removed),
        tuple(rewired),
        {name: tuple(made) for name, made in replaced.items()},
    )


def _rewired(before: NodeState, after: NodeState) -> Rewired:
    names = dict.fromkeys([*before.arguments, *after.arguments])
    missing = object()
    changed = [n for n in names if before.arguments.get(n, missing) != after.arguments.get(n, missing)]
    sides = [{n: state.arguments[n] for n in changed if n in state.arguments} for state in (before, after)]
    if before.target != after.target:
        sides = [{"target": state.target, **side} for state, side in zip((before, after), sides, strict=True)]
    return Rewired(after.name, *sides)


def order_of(snapshots: Sequence[Snapshot]) -> tuple[list[NodeState], list[list[int]]]:
    """All different nodes of some snapshots in one list, and for each snapshot the places of its nodes in the list."""
    numbers: dict[int, int] = {}
    states: list[NodeState] = []
    orders = []
    for nodes in snapshots:
        for state in nodes:
            if id(state) not in numbers:
                numbers[id(state)] = len(states)
                states.append(state)
        orders.append([numbers[id(state)] for state in nodes])
    return states, orders
