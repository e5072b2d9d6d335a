"""What the passes did to one layer, step by step, from a history."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from fxquant.inspect.history import History, Step, TensorChange
from fxquant.inspect.snapshots import NodeState, Snapshot
from fxquant.text import is_inside


@dataclass(frozen=True)
class Event:
    """What one step did to a layer.

    Attributes:
        step: Name of the step.
        nodes: Changes of nodes, one text each, such as ``- linear_3 (product)``: ``+`` added, ``-`` removed, ``~``
            rewired.
        tensors: Changes of tensors, one text each, such as ``to_q.weight: folded times 0.5..2 along its columns``.
        elsewhere: Changes of tensors of other layers that absorbed what was taken from this one, one text each.
    """

    step: str
    nodes: tuple[str, ...]
    tensors: tuple[str, ...]
    elsewhere: tuple[str, ...] = ()


def belongs(state: NodeState, name: str) -> bool:
    """Whether a node belongs to a layer, or to a module or one of the layers in it."""
    return any(is_inside(owner, name) for owner in (state.module, *state.roles))


def events_of(history: History, name: str, absorbers: Collection[str] = ()) -> Iterator[Event]:
    """The steps that changed a layer.

    Args:
        history: The history of the graph.
        name: Name of a layer, or path of a module.
        absorbers: What absorbed the factors or shifts of the layer, as the plan names it: layers, or nodes.
    """
    for before, after in zip(history.steps, history.steps[1:], strict=False):
        nodes = tuple(_nodes(before, after, name))
        tensors = tuple(str(change) for change in after.tensors if _touches(change, name) and change.what != "made")
        elsewhere = tuple(
            str(change)
            for change in after.tensors
            if after.name.startswith("absorb-") and change.what in ("folded", "copied")
            if not _touches(change, name) and _is_absorber(change, absorbers, before.nodes)
        )
        if nodes or tensors or elsewhere:
            yield Event(after.name, nodes, tensors, elsewhere)


def _nodes(before: Step, after: Step, name: str) -> Iterator[str]:
    old, new = ({state.name: state for state in step.nodes if belongs(state, name)} for step in (before, after))
    rewired = {entry.node for entry in after.change.rewired}
    for state in old.values():
        if state.name in after.change.removed:
            yield f"- {_node(state, name)}"
    for state in new.values():
        if state.name in after.change.added:
            yield f"+ {_node(state, name)}"
        elif state.name in rewired:
            yield f"~ {_node(state, name)}"


def _node(state: NodeState, name: str) -> str:
    role = state.roles.get(name) or ", ".join(dict.fromkeys(state.roles.values()))
    what = (
        f"tensor {state.target}" if state.kind == "tensor" else f"{state.name} = {state.target.removeprefix('aten::')}"
    )
    return f"{what} ({role})" if role else what


def _touches(change: TensorChange, name: str) -> bool:
    return any(is_inside(owner, name) for owner in change.layers)


def _is_absorber(change: TensorChange, absorbers: Collection[str], nodes: Snapshot) -> bool:
    """Whether a tensor belongs to something that the plan names as an absorber: a layer, a node, or a tensor."""
    if change.tensor in absorbers or any(owner in absorbers for owner in change.layers):
        return True
    readers = (state for state in nodes if state.name in absorbers)
    reads = {name for state in readers for name in state.inputs}
    return any(state.target == change.tensor for state in nodes if state.name in reads)
