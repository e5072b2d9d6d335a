"""The graphs of the page: one graph after every pass, in few bytes.

The format, as :func:`graph_data` returns it. Every text is in ``strings`` once; nodes hold its place there::

    call       the call that the graph serves, as text
    strings    texts
    nodes      every different state of a node once: [name, op, module, layer, role, shape, dtype, source, inputs,
               tensors, arguments, made by]
                 op          "input" and "output" for inputs and the output of the model
                 layer       the layer that it works for; role: what it does there
                 shape       sizes with commas; dtype and shape are null for a value that is not one tensor
                 inputs      names of the nodes that it reads; tensors: names of the stored tensors that it reads
                 arguments   name, value, name, value, ...; `%node` is a node and `@name` a tensor
                 made by     [pass, [node, ...]], the oldest first; empty for nodes of the model
    tensors    every different state of a stored tensor once: [name, shape, dtype, bytes, passes, layers]
    steps      the captured graph, one step per pass, and the lowered graph:
                 name, pass (its text), phase, seconds or null, edits, ops
                 nodes       [[first, count], ...] of `nodes`, in order; null if they are those of the step before
                 tensors     the same of `tensors`
                 changed     [[tensor, what was done to it], ...]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fxquant.inspect.history import History, Step
from fxquant.inspect.snapshots import NodeState, order_of


def graph_data(history: History) -> dict[str, Any]:
    """The history of one graph as JSON values."""
    texts = _Texts()
    _, orders = order_of([step.nodes for step in history.steps])
    nodes, tensors = _Table(), _Table()
    steps: list[dict[str, Any]] = []
    for number, (step, order) in enumerate(zip(history.steps, orders, strict=True)):
        entry = _step(step)
        if number and order == orders[number - 1]:
            entry |= {"nodes": None, "tensors": None}
        else:
            stored = {state.name: state.target for state in step.nodes if state.kind == "tensor"}
            rows = [nodes.place(_node(state, stored, texts)) for state in step.nodes if state.kind != "tensor"]
            read = [tensors.place(_tensor(state, texts)) for state in step.nodes if state.kind == "tensor"]
            entry |= {"nodes": _runs(rows), "tensors": _runs(read)}
        steps.append(entry)
    return {
        "call": history.call,
        "strings": list(texts.known),
        "nodes": nodes.rows,
        "tensors": tensors.rows,
        "steps": steps,
    }


class _Texts:
    """Numbers texts in the order in which they come."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}

    def __call__(self, text: str | None) -> int | None:
        return None if text is None else self.known.setdefault(text, len(self.known))

    def all(self, texts: Iterable[str]) -> list[int | None]:
        return [self(text) for text in texts]


class _Table:
    """Rows, each different one once."""

    def __init__(self) -> None:
        self.rows: list[list[Any]] = []
        self._known: dict[str, int] = {}

    def place(self, row: list[Any]) -> int:
        """The number of a row."""
        number = self._known.setdefault(repr(row), len(self.rows))
        if number == len(self.rows):
            self.rows.append(row)
        return number


def _step(step: Step) -> dict[str, Any]:
    changed: dict[str, list[str]] = {}
    for change in step.tensors:
        if change.changes_numbers:
            changed.setdefault(change.tensor, []).append(change.done)
    return {
        "name": step.name,
        "pass": step.text if step.name != "captured" else step.name,
        "phase": step.phase,
        "seconds": step.seconds,
        "edits": step.edits if step.name != "lower" else len(step.change.added) + len(step.change.removed),
        "ops": dict(step.ops),
        "changed": [[name, "; ".join(what)] for name, what in changed.items()],
    }


def _node(state: NodeState, stored: Mapping[str, str], texts: _Texts) -> list[Any]:
    arguments = [
        text for name, value in state.arguments.items() for text in (texts(name), texts(_shown(value, stored)))
    ]
    layer = state.layer if state.layer is not None else next(iter(state.roles), None)
    return [
        texts(state.name),
        texts(state.target if state.kind == "call" else state.kind),
        texts(state.module),
        texts(layer),
        texts(_role(state)),
        texts(_size(state)),
        texts(state.dtype),
        texts(state.source),
        texts.all(name for name in state.inputs if name not in stored),
        texts.all(stored[name] for name in state.inputs if name in stored),
        arguments,
        [[texts(name), texts.all(sources)] for name, sources in state.made_by],
    ]


def _role(state: NodeState) -> str | None:
    """What a node does in its layers: one role, or the roles with their layers if they differ."""
    roles = dict.fromkeys(state.roles.values())
    if len(roles) > 1:
        return ", ".join(f"{role} of {layer}" for layer, role in state.roles.items())
    others = list(state.roles)[1:]
    return next((f"{role}, of {', '.join(others)} too" if others else role for role in roles), None)


def _tensor(state: NodeState, texts: _Texts) -> list[Any]:
    return [
        texts(state.target),
        texts(_size(state)),
        texts(state.dtype),
        state.num_bytes,
        texts.all(dict.fromkeys(name for name, _ in state.made_by)),
        texts.all(state.roles),
    ]


def _size(state: NodeState) -> str | None:
    return None if state.shape is None else ", ".join(map(str, state.shape))


def _shown(value: Any, stored: Mapping[str, str]) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_shown(item, stored) for item in value) + "]"
    if isinstance(value, str) and value.startswith("%") and value[1:] in stored:
        return f"@{stored[value[1:]]}"
    return str(value)


def _runs(places: Iterable[int]) -> list[list[int]]:
    """Numbers as runs of consecutive ones: first and count."""
    runs: list[list[int]] = []
    for place in places:
        if runs and place == runs[-1][0] + runs[-1][1]:
            runs[-1][1] += 1
        else:
            runs.append([place, 1])
    return runs
