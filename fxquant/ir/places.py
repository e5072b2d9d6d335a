"""Where nodes come from: the pass that made a node, and its place in the model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from fxquant.ir.meta import LAYER


@dataclass(frozen=True)
class Origin:
    """Where a node comes from: the pass that made it, and the nodes that it was made from."""

    pass_name: str
    sources: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.pass_name}({', '.join(self.sources)})"


def label(node: fx.Node) -> str:
    """A node for messages: its name, with its layer if it has one."""
    return f"node {node.name} (layer {node.meta[LAYER]})" if LAYER in node.meta else f"node {node.name}"


def place_of(node: fx.Node) -> str:
    """The place of a node in the model: its layer, or its module and op.

    Unlike node names, places agree between the graphs of a model, one per kind of call. These graphs share their
    tensors by name, so a tensor's name must not depend on how many nodes came before it.
    """
    if LAYER in node.meta:
        return str(node.meta[LAYER])
    modules = [str(path) for path, _ in node.meta.get("nn_module_stack", {}).values()]
    op = str(getattr(node.target, "_name", node.name)).partition("::")[2].partition(".")[0] or node.name
    op += "_" * hasattr(nn.Module, op)  # An attribute of modules, such as ``to``, cannot hold a tensor.
    return f"{modules[-1]}.{op}" if modules and modules[-1] else op
