"""Layers and attentions that the graphs of one model use different numbers of times, or observe differently.

Uses of one weight within a graph are numbered: ``embed``, ``embed@2``. In a graph with fewer uses, a number does not
tell which use is meant. So all uses take what is valid for each of them: ranges that cover the values of all uses.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from torch import fx

from fxquant.errors import CalibrationError
from fxquant.ir.arguments import args, source_of
from fxquant.ir.attention import find_attentions
from fxquant.ir.layers import LAYER_OPS, layer_name
from fxquant.ir.meta import ITEM, LAYER
from fxquant.planning.decisions import ActivationRange, LayerPlan
from fxquant.planning.plan import Plan
from fxquant.statistics.collection import Statistics

T = TypeVar("T")

_NUMBER = re.compile(r"@\d+$")
_TOGETHER = "@all"  # Suffix of the key of statistics that several observed values share.
_ANY = "@any"  # Suffix of the name of a use if the graph does not tell which use it is.

Keys = Mapping[str, Iterable[str]]
"""The keys of the statistics over all graphs, by layer, or by attention and side as in ``blocks.0.attn:q``."""


def unnumbered(name: str) -> str:
    """The name of a layer or attention without the number of its use."""
    return _NUMBER.sub("", name)


def names_in(graph: fx.Graph) -> list[str]:
    """The names of the layers and attentions of a graph, one for each use."""
    layers = [str(node.meta[LAYER]) for node in _layers(graph)]
    return [*layers, *(found.name for found in find_attentions(graph))]


def _layers(graph: fx.Graph) -> Iterator[fx.Node]:
    return (node for node in graph.nodes if LAYER in node.meta and node.target in LAYER_OPS)


def adopt_names(graph: fx.Graph, plan: Plan) -> None:
    """Give layers that a plan does not know the names that plans of earlier versions use for them.

    Those plans name a layer with a shared weight after one of the weight's owners, and a layer whose weight is cast
    after its node.
    """
    seen: Counter[str] = Counter()
    for node in graph.nodes:
        if plan.naming > 1 or node.target not in LAYER_OPS:
            continue
        weight = args(node).node("weight")
        name = layer_name(str(weight.target)) if weight.op == "get_attr" else node.name
        seen[name] += 1
        earlier = name if seen[name] == 1 else f"{name}@{seen[name]}"
        if node.meta.get(LAYER, earlier) not in plan.layers and earlier in plan.layers:
            node.meta[LAYER] = earlier


def keys_in(plan: Plan, graph: fx.Graph) -> Iterator[tuple[str, str]]:
    """The keys of the observers that were just inserted into a graph, as pairs of a name as in ``Keys`` and a key."""
    for name in names_in(graph):
        layer, attention = plan.layers.get(name), plan.attentions.get(name)
        if layer is not None and layer.observed is not None:
            yield name, layer.observed
        if attention is not None:
            yield from ((f"{name}:{side}", key) for side, key in attention.observed.items())


def combine(graphs: Sequence[fx.Graph], plan: Plan, keys: Keys, statistics: Statistics) -> None:
    """Give each layer and attention the statistics of all values that its one range has to cover.

    These are the values that it read in different graphs. If the graphs use it different numbers of times, they are the
    values of all its uses.
    """
    uneven = _uneven(Counter(map(unnumbered, names_in(graph))) for graph in graphs)
    together: dict[str, dict[str, None]] = {}
    parts: dict[str, str] = {}
    for entry, own in keys.items():
        name, colon, side = entry.partition(":")
        base = unnumbered(name)
        parts[entry] = f"{base if base in uneven else name}{colon}{side}"
        together.setdefault(parts[entry], {}).update(dict.fromkeys(key for key in own if key in statistics))
    for whole, recorded in together.items():
        if len(recorded) > 1:
            statistics.combine(recorded, f"{whole}{_TOGETHER}")
    for entry, whole in parts.items():
        if len(together[whole]) > 1:
            name, _, side = entry.partition(":")
            if side:
                plan.attentions[name].observed[side] = f"{whole}{_TOGETHER}"
            else:
                plan.layers[name].observed = f"{whole}{_TOGETHER}"


def _uneven(counts: Iterable[Counter[str]]) -> set[str]:
    """The names that are used different numbers of times by the graphs that use them."""
    often: dict[str, set[int]] = {}
    for graph in counts:
        for base, number in graph.items():
            often.setdefault(base, set()).add(number)
    return {base for base, numbers in often.items() if len(numbers) > 1}


def settle(graph: fx.Graph, plan: Plan) -> None:
    """If a further graph has another number of uses than the plan, give its uses a range that covers all uses.

    Args:
        graph: The graph, whose uses are renamed.
        plan: A plan for this graph only, which receives the range.

    Raises:
        CalibrationError: If there are uses that the plan does not know, or if decisions differ between uses.
    """
    adopt_names(graph, plan)
    attentions, layers = _by_base(plan.attentions), _by_base(plan.layers)
    for base, number in Counter(unnumbered(found.name) for found in find_attentions(graph)).items():
        entries = [*attentions.get(base, {}).values()]
        if len(entries) in (0, number) or all(entry.bits is None for entry in entries):
            continue
        what = f"the attention {base!r}"
        if number > len(entries):
            raise _refusal(what, number, len(entries), "so it is not known what ranges the further uses need")
        if any(entry.ranges != entries[0].ranges for entry in entries):
            names = ";".join(f"{name}=float" for name in attentions[base])
            keep = f", or keep it float: assign-precision{{overrides={names}}}"
            raise _refusal(what, number, len(entries), "and each use has its own ranges", keep)
    nodes: dict[str, list[fx.Node]] = {}
    for node in _layers(graph):
        nodes.setdefault(unnumbered(node.meta[LAYER]), []).append(node)
    for base, found in nodes.items():
        uses = layers.get(base, {})
        if len(uses) in (0, len(found)):
            continue
        combined = len(uses) > 1 and len({use.observed for use in uses.values()}) == 1
        if combined and len(found) < len(uses):
            continue  # The uses share their statistics, so the decisions for one are valid for each.
        plan.layers[f"{base}{_ANY}"] = _covering(base, uses, len(found), plan, _are_of_items(found))
        for node in found:
            node.meta[LAYER] = f"{base}{_ANY}"


def _by_base(entries: Mapping[str, T]) -> dict[str, dict[str, T]]:
    found: dict[str, dict[str, T]] = {}
    for name, entry in entries.items():
        found.setdefault(unnumbered(name), {})[name] = entry
    return found


def _are_of_items(nodes: Sequence[fx.Node]) -> bool:
    """Whether each use of a layer reads a different item of one list; a longer list then has more such uses."""
    read = [_items_behind(source_of(node)) for node in nodes]
    lists = {of.meta[ITEM] for items in read for of in items}
    for name in lists:
        own = [[item for item in items if item.meta[ITEM] == name] for items in read]
        if all(len(items) == 1 for items in own) and len({items[0] for items in own}) == len(nodes):
            return True
    return False


def _items_behind(value: object) -> set[fx.Node]:
    """The graph inputs that are items of lists and that a value is computed from."""
    found, seen, items = [value], set(), set()
    while found:
        node = found.pop()
        if isinstance(node, fx.Node) and node not in seen:
            seen.add(node)
            found += node.all_input_nodes
            if ITEM in node.meta:
                items.add(node)
    return items


def _covering(base: str, uses: Mapping[str, LayerPlan], number: int, plan: Plan, alike: bool) -> LayerPlan:
    """The entry that is valid for any use of a layer, if plan and graph have different numbers of uses.

    Args:
        base: The layer.
        uses: The uses that the plan knows, by name.
        number: How many uses the graph has.
        plan: The plan.
        alike: Whether further uses are known to be like those that the plan knows.

    Raises:
        CalibrationError: If no such entry exists.
    """
    if len({use.precision for use in uses.values()}) > 1:
        raise _refusal(repr(base), number, len(uses), "and each use has its own bits")
    if any(name in plan.vectors or f"{name}.shift" in plan.vectors for name in uses):
        raise _refusal(repr(base), number, len(uses), "and each use is balanced differently")
    first = next(iter(uses.values()))
    ranges = [use.activation for use in uses.values() if use.activation is not None]
    if not ranges or ranges[0].method == "dynamic":
        return replace(first)
    if number > len(uses) and not alike:
        raise _refusal(repr(base), number, len(uses), "so it is not known what range the further uses need")
    method = ranges[0].method
    lows, highs = ([_bounds(getattr(found, end)) for found in ranges] for end in ("low", "high"))
    if len({use.boundaries for use in uses.values()}) > 1 or len({*map(len, lows)}) > 1:
        whole = ActivationRange(min(map(min, lows)), max(map(max, highs)), method)
        return replace(first, activation=whole, timesteps=None)  # Their timestep bins differ, so one range is for all.
    low, high = ([choose(bin_) for bin_ in zip(*ends, strict=True)] for choose, ends in ((min, lows), (max, highs)))
    if len(low) == 1:
        return replace(first, activation=ActivationRange(low[0], high[0], method))
    return replace(first, activation=ActivationRange(low, high, method))


def _bounds(ends: float | list[float]) -> list[float]:
    return ends if isinstance(ends, list) else [ends]


def _refusal(what: str, number: int, known: int, why: str, otherwise: str = "") -> CalibrationError:
    return CalibrationError(
        f"this call of the model uses {what} {_times(number)}, but the calibration calls use it {_times(known)}, "
        f"{why}; calibrate with calls of both kinds{otherwise}"
    )


def _times(number: int) -> str:
    return {1: "once", 2: "twice"}.get(number, f"{number} times")
