"""Assign each node of a float graph and of a lowered graph to a row of a profile, so that the two can be compared.

A row is a layer, or the work of one kind in one module. Nodes that passes made belong to the row of what they replace:
a quantization to the layer that reads it, two products of codes to the attention. A float op that became part of
another layer's kernel, such as a GELU in the linear before it, is counted with that layer for both graphs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import fx

from fxquant.inspect.profiling.kinds import kind_of
from fxquant.ir.meta import LAYER, PROVENANCE
from fxquant.ir.names import qualified_name

_LIGHT = ("quantize", "layout", "pointwise")


@dataclass(frozen=True, order=True)
class Place:
    """A row: a layer by its stable name with kind ``layer``, or a module's path with the kind of work in it."""

    name: str
    kind: str

    @property
    def is_layer(self) -> bool:
        """Whether this is a layer of the plan."""
        return self.kind == "layer"


@dataclass
class Attribution:
    """The places of the nodes of two graphs of the same call.

    Attributes:
        lowered: Place of each called node of the lowered graph, by its name.
        original: Place of each called node of the float graph, by its name.
        inside: For each place of a layer whose kernel also does the work of other layers: these other layers.
    """

    lowered: dict[str, Place]
    original: dict[str, Place]
    inside: dict[Place, tuple[str, ...]] = field(default_factory=dict)


def attribute(lowered: fx.Graph, original: fx.Graph) -> Attribution:
    """Assign every called node of both graphs to its place.

    Args:
        lowered: The graph that the backend runs.
        original: The graph that was captured from the float model for the same call.
    """
    floats = {node.name: node for node in _called(original)}
    original_places = {name: _own_place(node) for name, node in floats.items()}
    kept = {node.name: qualified_name(node.target) for node in _called(lowered)}
    gone = {name for name, node in floats.items() if kept.get(name) != qualified_name(node.target)}
    places = {node.name: _place(node, gone, original_places) for node in _called(lowered)}
    found = Attribution(places, original_places)
    _follow(found, lowered, gone)
    return found


def _called(graph: fx.Graph) -> Iterable[fx.Node]:
    return (node for node in graph.nodes if node.op == "call_function")


def _sources(node: fx.Node) -> list[str]:
    """Names of the original nodes that a node replaces, through all passes."""
    return [name for origin in node.meta.get(PROVENANCE, ()) for name in origin.sources]


def _own_place(node: fx.Node) -> Place:
    if LAYER in node.meta:
        return Place(str(node.meta[LAYER]), "layer")
    paths = [str(path) for path, _ in node.meta.get("nn_module_stack", {}).values()]
    path = paths[-1] if paths else ""
    return Place(path if path.isprintable() and not path.startswith("_") else "", kind_of(node))


def _place(node: fx.Node, gone: set[str], original: dict[str, Place]) -> Place:
    if LAYER in node.meta or PROVENANCE not in node.meta:
        return _own_place(node)
    replaced = next((original[name] for name in _sources(node) if name in gone), None)
    return replaced or _reader(node) or _own_place(node)


def _reader(node: fx.Node) -> Place | None:
    """The layer that reads a node that passes made, such as a quantization; the first layer if several read it."""
    seen = {node}
    while LAYER not in node.meta:
        if PROVENANCE not in node.meta or kind_of(node) not in _LIGHT:
            return None
        reader = next(iter(node.users), None)
        if reader is None or reader in seen:
            return None
        seen.add(reader)
        node = reader
    return _own_place(node)


def _follow(found: Attribution, lowered: fx.Graph, gone: set[str]) -> None:
    """Count float nodes that are gone from the lowered graph at the place that does their work now."""
    carriers: dict[str, list[Place]] = {}
    for node in _called(lowered):
        for name in _sources(node):
            if name in gone:
                carriers.setdefault(name, []).append(found.lowered[node.name])
    rows = set(found.lowered.values())
    for name, places in carriers.items():
        own = found.original[name]
        if own in places or (own.is_layer and own in rows):
            continue
        place = next((place for place in places if place.is_layer), places[0])
        found.original[name] = place
        if own.is_layer:
            found.inside[place] = (*found.inside.get(place, ()), own.name)
