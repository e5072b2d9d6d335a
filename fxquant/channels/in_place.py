"""Which parameters can change in place, so that the model computes the same with nothing else changed.

A fold may add a parameter to an op, or give some readers of a parameter a copy of their own. A graph can hold such
tensors, a model of the same class cannot.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import fx

from fxquant.channels.rules import shape_of
from fxquant.channels.wants import Want
from fxquant.ir.arguments import args, source_of
from fxquant.ir.layers import parameter_of
from fxquant.ir.meta import NAMES
from fxquant.ir.places import place_of
from fxquant.ir.shared import attributes_of


def not_in_place(
    node: fx.Node, gives: str | None = None, users: Sequence[fx.Node] | None = None, want: Want | None = None
) -> str | None:
    """Why the result of an op cannot be scaled or shifted by changing parameters in place; None if it can.

    Args:
        node: An op with parameters, or the ``get_attr`` node of a parameter that is read as a value.
        gives: Name of a parameter that the op lacks and would be given.
        users: Of a ``get_attr`` node, the users that read the changed value; all if None.
        want: The request on the value.
    """
    if gives is not None:
        return f"{node.name} ({place_of(node)}) has no {gives}, and the model's class would not read one"
    if node.op == "get_attr":
        if want is not None and any(size == 1 < want.scale.shape[axis] for axis, size in enumerate(shape_of(node))):
            return f"{node.target} holds one element for all channels"
        return _unfit(node, set(node.users) if users is None else users)
    reasons = (_unfit_argument(node, name) for name in ("weight", "bias") if _reads(node, name))
    return next((reason for reason in reasons if reason is not None), None)


def unfit_weight(reader: fx.Node, *names: str) -> str | None:
    """Why these parameters of a linear cannot change in place; None if they can.

    Args:
        reader: The linear.
        names: Names of parameters among its arguments; one that is not given cannot change.
    """
    for name in names:
        if not _reads(reader, name):
            return not_in_place(reader, name)
        if (reason := _unfit_argument(reader, name)) is not None:
            return reason
    return None


def _reads(node: fx.Node, name: str) -> bool:
    return any(attributes_of(node)) and isinstance(getattr(args(node), name, None), fx.Node)


def _unfit_argument(node: fx.Node, name: str) -> str | None:
    reader, attribute = node, args(node).node(name)
    if parameter_of(attribute).op != "get_attr":
        return f"the {name} of {node.name} ({place_of(node)}) is computed in the graph"
    while attribute.op != "get_attr":  # Read through a cast.
        if set(attribute.users) != {reader}:
            return f"the {name} of {node.name} ({place_of(node)}) has other readers"
        reader, attribute = attribute, source_of(attribute)
    return _unfit(attribute, {reader})


def _unfit(attribute: fx.Node, users: Collection[fx.Node]) -> str | None:
    """Why a tensor cannot change for these users."""
    others = [user for user in attribute.users if user not in users]
    if others:
        return f"{attribute.target} is also read by {others[0].name} ({place_of(others[0])})"
    module = attribute.graph.owning_module
    names = {} if module is None else module.meta.get(NAMES, {})
    if not names.get(str(attribute.target), False):
        return f"{attribute.target} is not a tensor of the model"
    return None
