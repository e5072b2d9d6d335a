"""Graphs that compute, or are given, what some modules return."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fxquant.errors import ConfigurationError
from fxquant.ir.borders import borders, changes_of
from fxquant.runtime.caches.cutting import Part, Run, part


@dataclass(frozen=True, eq=False)
class Modules:
    """A graph, and what modules in it return.

    Attributes:
        module: The graph.
        returned: For each module, by path, the nodes of the values that it returns.
    """

    module: fx.GraphModule
    returned: Mapping[str, tuple[fx.Node, ...]]
    _parts: dict[frozenset[str], Part] = field(default_factory=dict)

    @classmethod
    def of(cls, module: fx.GraphModule, paths: Iterable[str], zeros: Container[str] = ()) -> Modules:
        """Find what modules return in a graph.

        Args:
            module: The graph.
            paths: The modules.
            zeros: Those of them that are taken to return zeros.

        Raises:
            ConfigurationError: If a value is not in the graph, or a pass shifted it. Names the module, and says what
                to do.
        """
        found: dict[str, list[list[fx.Node]]] = {}
        for border, nodes in borders(module.graph).items():
            if border.argument is None:
                found.setdefault(border.module, []).append(nodes)
        for path in paths:
            if path not in found or any(len(nodes) != 1 for nodes in found[path]):
                raise ConfigurationError(
                    f"this cache of steps cannot be used: what {path} returns is not one value of this graph. It is "
                    "called several times or never, or the backend computes it together with the ops that follow, as "
                    "'native' does. Use FirstBlockCacheConfig, or let a TaylorSeerCacheConfig cache whole blocks "
                    r"(cache_identifiers=[r'.*blocks\.\d+']), or compile the model for another backend"
                )
            changes = [change for (node,) in found[path] for change in changes_of(node)]
            if any(change.moves or (change.shifts and path in zeros) for change in changes):
                why = "by constants, so zeros would not be zeros for what follows"
                if path not in zeros:
                    why = "by amounts that depend on the timestep, so a value of one step is not one of another"
                raise ConfigurationError(
                    f"this cache of steps cannot be used: the recipe shifts the channels of what {path} returns {why}. "
                    "Name attentions or whole blocks, or leave the cache out"
                )
        return cls(module, {path: tuple(nodes[0] for nodes in found[path]) for path in paths})

    def run(self, inputs: Sequence[Any], given: Mapping[str, Sequence[Any]], run: Run) -> tuple[Any, Any]:
        """The outputs of the graph, and by path what those modules return that were computed.

        Args:
            inputs: The inputs of the graph.
            given: By path, what modules are taken to return. They are not computed.
            run: Runs a graph.
        """
        skipped = frozenset(given)
        output = self.module.graph.output_node()
        known = [node for path in given for node in self.returned[path]]
        if skipped not in self._parts:
            wanted = [node for path, nodes in self.returned.items() if path not in given for node in nodes]
            self._parts[skipped] = part(self.module, [*output.all_input_nodes, *wanted], known)
        placeholders = [node for node in self.module.graph.nodes if node.op == "placeholder"]
        values = dict(zip(placeholders, inputs, strict=True))
        values.update(zip(known, (value for values in given.values() for value in values), strict=True))
        values.update(self._parts[skipped].run(values, run))
        made = {path: [values[n].detach() for n in nodes] for path, nodes in self.returned.items() if path not in given}
        leaves: Any = fx.node.map_arg(output.args[0], values.__getitem__)
        return tuple(leaves), made
