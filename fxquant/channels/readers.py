"""The readers of a value, how much of it they read, which values have tokens, and sizes of the captured call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from fxquant.channels.rules import Rule, outcome, shape_of
from fxquant.channels.wants import Push, Want
from fxquant.ir.arguments import source_of
from fxquant.ir.names import qualified_name

MANY = 2**20  # Limit of unread positions; above it, one variable for each would take too much memory for its benefit.
_SHARERS = ("chunk", "split", "unbind")  # Ops whose result is a tuple of parts, each read separately.
_PART_READERS = ("aten::slice", "aten::select", "aten::narrow")
_SHAPE_READERS = (
    *("aten::sym_size", "aten::sym_numel", "aten::sym_stride", "aten::size"),
    *("aten::new_", "aten::zeros_like", "aten::ones_like", "aten::full_like", "aten::empty_like", "aten::rand"),
)
# Ops that read only the form of their second argument.
_LIKE_ANOTHER = ("aten::type_as", "aten::expand_as", "aten::view_as", "aten::reshape_as")


def readers_of(node: fx.Node) -> list[fx.Node]:
    """The nodes that read a value's elements, not only its shape; for a chunk, the node of each of its parts."""
    found = []
    for user in node.users:
        name = qualified_name(user.target)
        if name.startswith(_SHAPE_READERS) or (name.startswith(_LIKE_ANOTHER) and source_of(user) is not node):
            continue
        if any(sharer in name for sharer in _SHARERS):
            found += list(user.users)
        else:
            found.append(user)
    return found


def direct_user(node: fx.Node, reader: fx.Node) -> fx.Node:
    """The user of a value through which this reader reads it: the reader itself, or the chunk whose part it reads."""
    return reader if node in reader.all_input_nodes else reader.all_input_nodes[0]


def identity_share(reader: fx.Node, node: fx.Node, rules: Mapping[Any, Rule]) -> Want | None:
    """The part of ``node`` that a reader without a request reads, as a want; None if it may read everything."""
    name = qualified_name(reader.target)
    shared = node not in reader.all_input_nodes  # Read through a chunk.
    if not shared and not name.startswith(_PART_READERS):
        return None
    found = outcome(reader, Want.identity(len(shape_of(reader))), rules)
    return found.inputs[0][1] if isinstance(found, Push) else None


def with_tokens(graph: fx.Graph) -> set[fx.Node]:
    """The values that depend on an input with an axis between batch and channels."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            has_tokens = len(shape_of(node)) >= 3
        else:
            name = qualified_name(node.target)
            read = [] if name.startswith(_SHAPE_READERS) else node.all_input_nodes
            if name == "aten::type_as":  # It reads only the dtype of the second.
                read = read[:1]
            has_tokens = any(source in found for source in read)
        if has_tokens:
            found.add(node)
    return found


def size_hint(size: Any) -> int:
    """A size; if it is symbolic, its value in the captured call, or :data:`MANY` if that is not known."""
    if isinstance(size, int):
        return size
    return MANY if size.node.hint is None else int(size.node.hint)


def batch_hint(graph: fx.Graph) -> int:
    """The batch size of the call that a graph was captured from; 1 if no input has one."""
    for node in graph.nodes:
        if node.op == "placeholder" and len(shape_of(node)) >= 2:
            size = shape_of(node)[0]
            return size_hint(size)
    return 1
