"""Where a node comes from: the passes that made it, and the model's own code behind it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import fx

from fxquant.errors import check_type
from fxquant.ir.meta import PROVENANCE
from fxquant.ir.places import Origin
from fxquant.ir.roles import module_path, roles_of
from fxquant.ir.source_lines import SourceLine, source_line


@dataclass(frozen=True)
class NodeOrigin:
    """Where a node comes from; prints as text.

    Attributes:
        node: Name of the node.
        made_by: The passes that made it, each with the nodes that it made it from, the oldest first. Empty if the node
            was captured from the model.
        module: Path of the module whose code is behind the node; empty for the model itself.
        line: The line of that code, or None if it is not known.
        roles: The layers that the node belongs to, with its role in each (:mod:`fxquant.ir.roles`).
    """

    node: str
    made_by: tuple[Origin, ...]
    module: str
    line: SourceLine | None
    roles: dict[str, str]

    def __str__(self) -> str:
        passes = [f"made by {one.pass_name} from {', '.join(one.sources) or 'nothing'}" for one in self.made_by]
        lines = [self.node, *(passes or ["captured from the model"])]
        lines += [f"{role} of {layer}" for layer, role in self.roles.items()]
        if self.module:
            lines.append(f"in module {self.module}")
        lines.append(str(self.line) if self.line else "the line of the model's code is not known")
        return "\n  ".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The same as JSON values."""
        data = asdict(self)
        if self.line is not None:
            data["line"] = {**asdict(self.line), "file": self.line.file}
        return data


def origin(node: fx.Node) -> NodeOrigin:
    """Say which passes made a node, and which line of the model's code is behind it.

    Args:
        node: A node of a graph of a quantized model, such as one of ``quantized.graphs[0].graph.nodes``.

    Raises:
        ConfigurationError: If it is not a node.
    """
    check_type("node", node, fx.Node, "a node of a graph, such as one of quantized.graphs[0].graph.nodes")
    made_by = tuple(node.meta.get(PROVENANCE, ()))
    return NodeOrigin(node.name, made_by, module_path(node), source_line(node), dict(roles_of(node)))
