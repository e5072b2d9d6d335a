"""Helpers of the passes that scale or shift inputs of linears: they select the values and the linears."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from fxquant.channels.in_place import unfit_weight
from fxquant.channels.solution import Seed
from fxquant.channels.wants import Cost
from fxquant.errors import ConfigurationError, shortened
from fxquant.ir.arguments import args
from fxquant.ir.layers import parameter_of
from fxquant.ir.meta import LAYER
from fxquant.planning.context import PassContext
from fxquant.planning.decisions import Balance, LayerPlan, Shift
from fxquant.planning.plan import Plan
from fxquant.planning.precision import ROLES


def parse_roles(pass_name: str, text: str) -> list[str]:
    """Read roles joined by ``+``.

    Raises:
        ConfigurationError: If a role is not known.
    """
    roles = text.split("+")
    unknown = set(roles) - set(ROLES)
    if unknown:
        raise ConfigurationError(f"{pass_name}: {', '.join(sorted(unknown))} is not a role; known: {', '.join(ROLES)}")
    return roles


def parse_cost(text: str) -> Cost:
    """Read the name of a cost.

    Raises:
        ConfigurationError: If there is no such cost.
    """
    try:
        return {str(cost): cost for cost in Cost if cost is not Cost.NOT}[text]
    except KeyError:
        known = "free, vector or tokens, or in-place"
        raise ConfigurationError(f"{shortened(text)!r} is not a cost; choose {known}") from None


def seeds_to_transform(
    graph: fx.Graph, context: PassContext, roles: Sequence[str], dearest: Cost = Cost.VECTOR, *parameters: str
) -> list[Seed]:
    """Values that linears to transform read, each with all linears that read it, those to transform first.

    The other readers, for example linears kept in float, undo the factor in their weights too. Otherwise they would
    prevent the transformation of the value.

    Args:
        graph: The graph.
        context: Its plan holds the layers.
        roles: Roles of the linears to transform.
        dearest: If ``IN_PLACE``, values are blocked whose readers cannot undo the change in parameters that they have.
        parameters: Names of the parameters in which readers undo it.
    """
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if LAYER in node.meta and node.target is torch.ops.aten.linear.default:
            value, weight = args(node).node("input"), args(node).node("weight")
            if parameter_of(weight).op == "get_attr":  # Otherwise a cast of the weight has other readers.
                readers.setdefault(value, []).append(node)
    seeds = []
    for value, nodes in readers.items():
        nodes.sort(key=lambda node: not is_target(node, context, roles))  # Stable: keeps the graph's order.
        if is_target(nodes[0], context, roles):
            reasons = (unfit_weight(node, *parameters) for node in nodes if dearest <= Cost.IN_PLACE)
            blocked = next((reason for reason in reasons if reason is not None), None)
            seeds.append(Seed(nodes[0].meta[LAYER], value, tuple(nodes), blocked=blocked))
    return seeds


@dataclass(frozen=True)
class Part:
    """Readers of one value that undo the same factors or shifts.

    Attributes:
        readers: The linears.
        vector: Factors float64 ``[in]``, or shifts float64 ``[bins, in]``.
        boundaries: Boundaries between the bins.
    """

    readers: tuple[fx.Node, ...]
    vector: Tensor
    boundaries: tuple[float, ...]

    def seed(self, of: Seed) -> Seed:
        """The seed, reduced to these readers."""
        return Seed(self.readers[0].meta[LAYER], of.value, self.readers)


def parts_of(seed: Seed, context: PassContext, roles: Sequence[str], suffix: str = "") -> list[Part]:
    """Group the readers of a value by the factors or shifts that they undo.

    A linear undoes the same in every graph of a model, whichever other layers read its input there, so that the graphs
    share its weight. Linears without an entry in the plan, such as those kept in float, undo the same as in the first
    graph.
    """
    shared = context.shared
    own = {node: _decided(node, context.plan, suffix) for node in seed.readers if is_target(node, context, roles)}
    default = next((found for found in own.values() if found is not None), None)
    parts: dict[tuple[bytes, tuple[float, ...]], tuple[Tensor, tuple[float, ...], list[fx.Node]]] = {}
    for node in seed.readers:
        name = node.meta[LAYER]
        found = own[node] if node in own else shared.columns.get((name, suffix))
        if found is None and default is not None and node not in own and name not in shared.layers:
            found = shared.columns[name, suffix] = default
        if found is not None:
            vector, boundaries = found
            parts.setdefault((vector.numpy().tobytes(), boundaries), (vector, boundaries, []))[2].append(node)
    return [Part(tuple(nodes), vector, boundaries) for vector, boundaries, nodes in parts.values()]


def seeds_undone_before(graph: fx.Graph, context: PassContext, seeds: Sequence[Seed], suffix: str = "") -> list[Seed]:
    """Values that no linear to transform reads, but a linear whose weight undoes a change because of another graph."""
    known = {reader for seed in seeds for reader in seed.readers}
    found = []
    for node in graph.nodes:
        if node.target is not torch.ops.aten.linear.default or node in known:
            continue
        value, weight = args(node).node("input"), parameter_of(args(node).node("weight"))
        if (node.meta.get(LAYER), suffix) in context.shared.columns and weight.op == "get_attr":
            found.append(Seed(node.meta[LAYER], value, (node,)))
    return found


def _decided(node: fx.Node, plan: Plan, suffix: str) -> tuple[Tensor, tuple[float, ...]] | None:
    name = node.meta[LAYER]
    vector = plan.vectors.get(f"{name}{suffix}")
    return None if vector is None else (vector, plan.layer(name).boundaries if suffix else ())


def follow(decision: Literal["balance", "shift"], layers: Sequence[Sequence[str]], plan: Plan) -> None:
    """Decide on layers that no earlier graph has, if layers that share factors or shifts with them are decided.

    Args:
        decision: What to decide.
        layers: The layers of one group; layers in one inner sequence read the same value.
        plan: The plan, which receives the decisions.
    """
    suffix = "" if decision == "balance" else ".shift"
    for names in layers:
        settled = next((name for name in names if getattr(plan.layer(name), decision) is not None), None)
        for name in names:
            layer = plan.layer(name)
            if getattr(layer, decision) is not None:
                continue
            if settled is None:
                reason = "channels that it would share them with were settled by calls of another kind"
            elif suffix and plan.layer(settled).boundaries != layer.boundaries:
                reason = f"{settled} reads the same value and was settled with other groups of timesteps"
            else:
                setattr(layer, decision, copy.deepcopy(getattr(plan.layer(settled), decision)))
                if f"{settled}{suffix}" in plan.vectors:
                    plan.vectors[f"{name}{suffix}"] = plan.vectors[f"{settled}{suffix}"].clone()
                continue
            if decision == "balance":
                layer.balance = Balance(cost="not", group=name, reason=reason)
            else:
                layer.shift = Shift(cost="not", reason=reason)


def is_transformed(layer: LayerPlan, roles: Sequence[str]) -> bool:
    """Whether a layer is a linear with one of these roles, whatever its precision."""
    return layer.kind == "linear" and layer.role in roles


def is_target(node: fx.Node, context: PassContext, roles: Sequence[str]) -> bool:
    """Whether a linear is to be transformed: it has one of these roles, and its weight is quantized."""
    layer = context.plan.layer(node.meta[LAYER])
    if not is_transformed(layer, roles) or layer.weight_bits is None:
        return False
    # An older plan has no decisions about linears with float activations; these linears then do not change.
    decided = (layer.balance, layer.shift, layer.timesteps) != (None, None, None)
    return layer.activation_bits is not None or decided or context.statistics is not None


def targets_of(seed: Seed, context: PassContext, roles: Sequence[str]) -> list[str]:
    """Names of the layers that read a value and are to be transformed."""
    return [node.meta[LAYER] for node in seed.readers if is_target(node, context, roles)]
