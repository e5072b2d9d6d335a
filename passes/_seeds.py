"""What the passes share that ask for scaled or shifted inputs of linears: which values, and which linears."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from fxquant.capture import LAYER
from fxquant.channels.rules.ends import parameter_of
from fxquant.channels.rules.table import node_of
from fxquant.channels.solve import Seed
from fxquant.channels.wants import Cost
from fxquant.errors import ConfigurationError
from fxquant.plan import Plan
from fxquant.precision import ROLES


def parse_roles(pass_name: str, text: str) -> list[str]:
    """Read roles joined by ``+``.

    Raises:
        ConfigurationError: If one is not known.
    """
    roles = text.split("+")
    unknown = set(roles) - set(ROLES)
    if unknown:
        raise ConfigurationError(f"{pass_name}: {', '.join(sorted(unknown))} is no role; known: {', '.join(ROLES)}")
    return roles


def parse_cost(text: str) -> Cost:
    """Read the name of a cost.

    Raises:
        ConfigurationError: If it is none.
    """
    try:
        return {"free": Cost.FREE, "vector": Cost.VECTOR, "tokens": Cost.TOKENS}[text]
    except KeyError:
        raise ConfigurationError(f"{text!r} is no cost; choose free, vector or tokens") from None


def seeds_to_transform(graph: fx.Graph, plan: Plan, roles: Sequence[str]) -> list[Seed]:
    """The values read by linears to balance, each with all linears that read it, those to balance first.

    The others, kept in float say, undo the factor in their weights as well: they would otherwise be in the way.
    """
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if LAYER in node.meta and node.target is torch.ops.aten.linear.default:
            value, weight = node_of(node.args[0]), node_of(node.args[1])
            if parameter_of(weight).op == "get_attr":  # Else others read what it is cast to.
                readers.setdefault(value, []).append(node)
    seeds = []
    for value, nodes in readers.items():
        nodes.sort(key=lambda node: not is_target(node, plan, roles))  # Stable: in the order of the graph.
        if is_target(nodes[0], plan, roles):
            seeds.append(Seed(nodes[0].meta[LAYER], value, tuple(nodes)))
    return seeds


def is_target(node: fx.Node, plan: Plan, roles: Sequence[str]) -> bool:
    layer = plan.layer(node.meta[LAYER])
    return layer.role in roles and layer.activation_bits is not None


def targets_of(seed: Seed, plan: Plan, roles: Sequence[str]) -> list[str]:
    """Names of the layers among the readers of a value that are to be balanced."""
    return [node.meta[LAYER] for node in seed.readers if is_target(node, plan, roles)]
