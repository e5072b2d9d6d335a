"""Which nodes of two graphs of one model, rewritten by different plans, correspond to each other.

Nodes of the model itself have the same names in both. Nodes that passes made are aligned by what they do: their op, the
layers that they belong to with their roles, and otherwise the module and the line of code behind them. Numbers of nodes
do not matter.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from fxquant.errors import ConfigurationError, UnknownNameError
from fxquant.inspect.snapshots import GraphChange, NodeState, Rewired, Snapshot
from fxquant.text import is_inside, nearest

_BLOCK = re.compile(r"[^.]+(?:\.[^.\d][^.]*)*\.(\d+)(?:\.|$)")
Key = tuple[Any, ...]


def keys_of(nodes: Snapshot) -> dict[str, Key]:
    """What identifies each node of a graph among the nodes of another one, by its name."""
    seen: Counter[Key] = Counter()
    found = {}
    for state in nodes:
        key = _key(state)
        found[state.name] = (*key, seen[key])
        seen[key] += 1
    return found


def _key(state: NodeState) -> Key:
    if state.kind != "call":
        return state.kind, state.target
    if not state.made_by:
        return "call", state.target, state.name
    roles = tuple(sorted(state.roles.items()))
    return ("made", state.target, roles) if roles else ("made", state.target, state.module, state.source)


def differences(left: Snapshot, right: Snapshot) -> GraphChange:
    """Compare two graphs of one model: ``added`` are nodes that only the right one has, named as there."""
    keys = keys_of(left), keys_of(right)
    old = {keys[0][state.name]: state for state in left}
    new = {keys[1][state.name]: state for state in right}
    names = [{f"%{name}": key for name, key in side.items()} for side in keys]
    rewired = []
    for key, state in new.items():
        before = old.get(key)
        if before is None:
            continue
        every = dict.fromkeys([*before.arguments, *state.arguments])
        changed = [
            name
            for name in every
            if _named(before.arguments.get(name), names[0]) != _named(state.arguments.get(name), names[1])
        ]
        if changed:
            sides = (
                {name: one.arguments[name] for name in changed if name in one.arguments} for one in (before, state)
            )
            rewired.append(Rewired(state.name, *sides))
    return GraphChange(
        tuple(state.name for key, state in new.items() if key not in old),
        tuple(state.name for key, state in old.items() if key not in new),
        tuple(rewired),
        {},
    )


def _named(value: Any, names: dict[str, Key]) -> Any:
    if isinstance(value, list):
        return [_named(item, names) for item in value]
    return names.get(value, value) if isinstance(value, str) else value


def part_of(nodes: Snapshot, block: str | None, layer: str | None) -> Snapshot:
    """The nodes that belong to a part of the model.

    Args:
        nodes: The graph.
        block: Number of a block, such as ``3``, or its path, such as ``transformer_blocks.3``; None for all blocks.
        layer: Name of a layer, or path of a module; None for all.

    Raises:
        UnknownNameError: If there are none. The message names the nearest blocks or layers.
        ConfigurationError: If the layer is not in the block.
    """
    found = tuple(state for state in nodes if _are_in_part(list(_places(state)), block, layer))
    if not found and block is not None and layer is not None:
        part_of(nodes, block, None)  # Names the one that does not exist.
        part_of(nodes, None, layer)
        raise ConfigurationError(
            f"layer {layer!r} is not in block {block!r}; leave out one of them, or name a layer of the block"
        )
    if not found and block is not None:
        places = (place for state in nodes for place in _places(state))
        raise UnknownNameError("block", block, nearest(block, blocks_among(places)))
    if not found and layer is not None:
        known = (name for state in nodes for name in (*state.roles, state.module) if name)
        raise UnknownNameError("layer", layer, nearest(layer, known))
    return found


def is_in_part(name: str, block: str | None, layer: str | None) -> bool:
    """Whether a layer or tensor belongs to a part of the model, as :func:`part_of` takes it."""
    return _are_in_part([name], block, layer)


def _are_in_part(places: Sequence[str], block: str | None, layer: str | None) -> bool:
    """Whether one of some names is in the block, and one in the layer or module."""
    if block is not None and not any(_is_in_block(place, block) for place in places):
        return False
    return layer is None or any(is_inside(place, layer) for place in places)


def _places(state: NodeState) -> Iterator[str]:
    yield state.module
    yield from state.roles
    if state.kind == "tensor":
        yield state.target


def _is_in_block(place: str, block: str) -> bool:
    if not block.isdigit():
        return is_inside(place, block)
    match = _BLOCK.match(place)
    return match is not None and match[1] == block


def blocks_among(names: Iterable[str]) -> list[str]:
    """Paths of the blocks that some layers or modules belong to, such as ``transformer_blocks.0``, for messages."""
    matches = [(name, _BLOCK.match(name)) for name in names]
    return list(dict.fromkeys(name[: match.end(1)] for name, match in matches if match))
