"""The arguments of ops by the names of their schemas, instead of by position.

torch's own ``Node.normalized_arguments`` binds a signature for every node, which takes 50 times as long.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import fx

from fxquant.errors import ArgumentError

_REQUIRED = object()


def args(node: fx.Node) -> Arguments:
    """The arguments of a ``call_function`` node whose target is an overload of an op: ``args(node).bits``."""
    return Arguments(node)


class Arguments:
    """The arguments of one node as attributes, whether they are given by position, by name or not at all.

    An argument that is not given has the default of the schema.

    Raises:
        ArgumentError: If the schema has no argument of the name, or the node does not give one without a default.
    """

    __slots__ = ("_node",)

    def __init__(self, node: fx.Node) -> None:
        self._node = node

    def __getattr__(self, name: str) -> Any:
        node = self._node
        try:
            position, default = _PLACES[node.target][name]
        except KeyError:
            position, default = _place(node, name)
        given = node.args
        if position < len(given):
            return given[position]
        value = node.kwargs.get(name, default)
        if value is default and isinstance(default, list):
            return list(default)  # The schema's own list is shared by all nodes.
        if value is _REQUIRED:
            raise ArgumentError(f"node {node.name} lacks the argument {name!r} of {_signature(node)}")
        return value

    def node(self, name: str) -> fx.Node:
        """An argument that is a node.

        Raises:
            ArgumentError: If it is something else.
        """
        value = getattr(self, name)
        if not isinstance(value, fx.Node):
            raise ArgumentError(
                f"argument {name!r} of node {self._node.name} is {value!r}, not a node; its op is "
                f"{_signature(self._node)}"
            )
        return value

    def gives(self, name: str) -> bool:
        """Whether the node gives an argument itself, and does not leave it to the default.

        Raises:
            ArgumentError: If the schema has no argument of the name.
        """
        return self.is_positional(name) or name in self._node.kwargs

    def by_name(self) -> dict[str, Any]:
        """All arguments that have a value, in the order of the schema."""
        return {name: getattr(self, name) for name in _places(self._node.target)}

    def is_keyword(self, name: str) -> bool:
        """Whether an argument is only given by name.

        Raises:
            ArgumentError: If the schema has no argument of the name.
        """
        return _place(self._node, name)[0] == sys.maxsize

    def is_positional(self, name: str) -> bool:
        """Whether the node gives an argument by its position.

        Raises:
            ArgumentError: If the schema has no argument of the name.
        """
        return _place(self._node, name)[0] < len(self._node.args)

    def replaced(self, /, **values: Any) -> tuple[Any, ...]:
        """The positional arguments with other values for some of them.

        Raises:
            ArgumentError: If the schema has no positional argument of one of the names.
        """
        found = list(self._node.args)
        for name, value in values.items():
            position, _ = _place(self._node, name)
            if self.is_keyword(name):
                raise ArgumentError(f"argument {name!r} of {_signature(self._node)} cannot be given by position")
            for missing in list(_places(self._node.target))[len(found) : position + 1]:
                found.append(getattr(self, missing))
            found[position] = value
        return tuple(found)

    def without(self, name: str) -> tuple[Any, ...]:
        """The positional arguments with one left to its default.

        Raises:
            ArgumentError: If the schema has no argument of the name, or no default for it.
        """
        position, default = _place(self._node, name)
        if default is _REQUIRED:
            raise ArgumentError(f"argument {name!r} of {_signature(self._node)} has no default")
        given = self._node.args
        return given[:position] if position + 1 >= len(given) else self.replaced(**{name: default})


def source_of(node: fx.Node) -> fx.Node:
    """The first argument, which is a node, of any op. Most ops compute their result from it.

    Raises:
        ArgumentError: If it is not a node.
    """
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        raise ArgumentError(f"the first argument of node {node.name} is {source!r}, not a node; it calls {node.target}")
    return source


def item_of(node: fx.Node) -> int:
    """Which item of a list or tuple a ``getitem`` node takes.

    Raises:
        ArgumentError: If this is not a number.
    """
    number = node.args[1]
    if not isinstance(number, int):
        raise ArgumentError(f"node {node.name} takes item {number!r}, which is not known before the graph runs")
    return number


_PLACES: dict[Any, dict[str, tuple[int, Any]]] = {}
"""Position and default of each argument, by op and name. Arguments that are only given by name are at sys.maxsize."""


def _place(node: fx.Node, name: str) -> tuple[int, Any]:
    found = _places(node.target).get(name)
    if found is None:
        raise ArgumentError(f"node {node.name} has no argument {name!r}; its op is {_signature(node)}")
    return found


def _places(op: Any) -> dict[str, tuple[int, Any]]:
    if not isinstance(op, torch._ops.OpOverload):
        return {}
    if op not in _PLACES:
        _PLACES[op] = {
            argument.name: (
                sys.maxsize if argument.kwarg_only else position,
                argument.default_value if argument.has_default_value() else _REQUIRED,
            )
            for position, argument in enumerate(op._schema.arguments)
        }
    return _PLACES[op]


def _signature(node: fx.Node) -> str:
    return str(getattr(node.target, "_schema", node.target))
