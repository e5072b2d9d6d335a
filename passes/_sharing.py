"""Work on layers by several processes: each does it for some layers, and all end with the results of all layers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor, fx

from fxquant.ir.layers import stored_weight
from fxquant.ir.meta import LAYER
from fxquant.ir.rewriter import Rewriter
from fxquant.numerics.weights import QuantizedWeight
from fxquant.planning.context import PassContext
from fxquant.planning.decisions import LayerPlan

if TYPE_CHECKING:
    from fxquant.distributed.team import Team

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")
Round = Callable[[fx.Node], QuantizedWeight]


@dataclass
class _Unit:
    """Layers that read one value, whose factorized second moments they share, so that one process rounds them."""

    layers: list[fx.Node] = field(default_factory=list)
    cost: float = 0.0
    columns: int = 0


def round_on_ranks(nodes: Sequence[fx.Node], context: PassContext, rewriter: Rewriter, round_one: Round) -> None:
    """Round the weights of layers on all ranks and give each rank the codes of all of them, in ``context.codes``.

    Each weight is rounded by one rank from the same statistics that all ranks hold, so the codes are those of one
    process.

    Args:
        nodes: The layers that one process would round, in order.
        context: Holds the team; receives the codes.
        rewriter: Gives the weights.
        round_one: Rounds the weight of a layer.

    Raises:
        RankError: If another rank failed or died.
        FxquantError: What ``round_one`` raises on this rank.
    """
    team = context.team
    assert team is not None
    units = _units(nodes, context, rewriter)
    ranks = owners([unit.cost for unit in units], team)
    owner_of = {node: rank for unit, rank in zip(units, ranks, strict=True) for node in unit.layers}
    for node, owner in owner_of.items():
        if owner == team.rank:
            context.codes[node.meta[LAYER]] = round_one(node)
    context.memo.pop("feedback", None)  # As large as two weights, and not needed by what comes next.
    for node, owner in owner_of.items():
        name = node.meta[LAYER]
        context.codes[name] = team.broadcast(context.codes.get(name), owner)


def unrounded(
    nodes: Iterable[fx.Node], context: PassContext, rewriter: Rewriter, is_rounded: Callable[[LayerPlan], bool]
) -> list[fx.Node]:
    """The layers whose codes are not known yet and are found by a rounding method, one for each weight.

    Args:
        nodes: The layers that get codes, in the order in which one process works on them.
        context: Holds the plan, and the codes that are known.
        rewriter: Knows what was folded into weights.
        is_rounded: Whether a layer is rounded by the method, not to nearest.
    """
    found, seen = [], set()
    for node in nodes:
        name, weight = node.meta[LAYER], stored_weight(node)
        layer = context.plan.layer(name)
        key = weight, layer.weight_format, layer.weight_bits, layer.group_size, layer.group_rows
        if weight is None or key in seen:
            continue
        seen.add(key)
        own = context.shared.is_rounded_here(name, rewriter.history(weight))
        if own and is_rounded(layer) and name not in context.codes:
            found.append(node)
    return found


def _units(nodes: Sequence[fx.Node], context: PassContext, rewriter: Rewriter) -> list[_Unit]:
    found: dict[str, _Unit] = {}
    for node in nodes:
        name, weight = node.meta[LAYER], stored_weight(node)
        assert weight is not None
        values: Tensor = rewriter.tensor(weight).flatten(1)
        out, columns = values.shape
        key = name if name in context.timestep_weights else context.plan.layer(name).observed or name
        unit = found.setdefault(key, _Unit())
        unit.layers.append(node)
        unit.cost += out * columns**2 + (0 if unit.columns else columns**3)
        unit.columns = columns
    return list(found.values())


def on_ranks(costs: Mapping[K, float], team: Team, compute: Callable[[K], T]) -> dict[K, T]:
    """Compute something for each of several things, each on one rank; all ranks get all results.

    Args:
        costs: The things, the same on all ranks, and what each takes, in any unit.
        team: The ranks.
        compute: Computes the result for one of them.

    Raises:
        RankError: If another rank failed or died.
        FxquantError: What ``compute`` raises on this rank.
    """
    ranks = dict(zip(costs, owners(list(costs.values()), team), strict=True))
    found = {key: compute(key) for key, rank in ranks.items() if rank == team.rank}
    return {key: team.broadcast(found.get(key), rank) for key, rank in ranks.items()}


def owners(costs: Sequence[float], team: Team) -> list[int]:
    """The rank that takes each piece of work: the costliest pieces first, each to the rank with the least work."""
    work = [0.0] * team.size
    found = [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        rank = min(range(team.size), key=lambda rank: work[rank])
        work[rank] += costs[number]
        found[number] = rank
    return found
