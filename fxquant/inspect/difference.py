"""What differs between two plans, checkpoints, models or recipes, or between a graph before and after a pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from torch import nn

from fxquant.errors import ConfigurationError, UnknownNameError, check_type, shortened
from fxquant.inspect.alignment import blocks_among, differences, is_in_part, part_of
from fxquant.inspect.history import History, Step, rewrite_history
from fxquant.inspect.layer_changes import LayerChange, facts_of, grouped, layer_changes
from fxquant.inspect.plans import plan_of
from fxquant.inspect.snapshots import GraphChange, NodeState, Snapshot
from fxquant.inspect.sources import Source, plan_if_alone
from fxquant.pipeline.recipes import Recipe, make_recipe
from fxquant.planning.plan import Plan
from fxquant.text import fitted, json_values, nearest

Compared = Source | Recipe


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that passes changed in different ways.

    Attributes:
        tensor: Name of the tensor.
        left: What passes did to it on the left, one text each, such as ``absorb-affines: folded times 0.5..2``.
        right: The same on the right.
    """

    tensor: str
    left: tuple[str, ...]
    right: tuple[str, ...]


@dataclass(frozen=True)
class Difference:
    """What differs; prints as text, and is false if nothing differs.

    Attributes:
        left: What is on the left, as text.
        right: What is on the right.
        facts: Facts of the whole that differ, such as ``backend``: left and right, as text.
        passes: Passes of the recipes that differ: left and right, as text; None where a side has no such pass.
        only_left: Layers and attentions that only the left side has.
        only_right: Layers and attentions that only the right side has.
        layers: Decisions about layers and attentions that differ.
        nodes: Nodes added, removed and rewired on the way from left to right; None if the graphs were not compared.
        ops: Op of each of these nodes, by name.
        tensors: Tensors that passes changed in different ways.
    """

    left: str
    right: str
    facts: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    passes: tuple[tuple[str | None, str | None], ...] = ()
    only_left: tuple[str, ...] = ()
    only_right: tuple[str, ...] = ()
    layers: tuple[LayerChange, ...] = ()
    nodes: GraphChange | None = None
    ops: Mapping[str, str] = field(default_factory=dict)
    tensors: tuple[TensorDifference, ...] = ()

    def __bool__(self) -> bool:
        graph = self.nodes and (self.nodes.added or self.nodes.removed or self.nodes.rewired)
        sides = self.only_left or self.only_right
        return bool(self.facts or self.passes or sides or self.layers or graph or self.tensors)

    def to_json(self) -> dict[str, Any]:
        """The difference as JSON values."""
        values = json_values(asdict(self))
        assert isinstance(values, dict)
        return values

    def __str__(self) -> str:
        parts = [f"left   {self.left}\nright  {self.right}"]
        if self.facts:
            parts.append(fitted(["", "left", "right"], [[key, *sides] for key, sides in self.facts.items()], {2: 56}))
        if self.passes:
            rows = [[left or "-", right or "-"] for left, right in self.passes]
            parts.append("recipe\n" + fitted(["left", "right"], rows, {0: 64, 1: 64}))
        for side, names in (("left", self.only_left), ("right", self.only_right)):
            if names:
                parts.append(f"layers only on the {side}\n  " + "\n  ".join(names))
        if self.layers:
            rows = grouped(self.layers)
            parts.append("decisions\n" + fitted(["layer", "what", "left", "right"], rows, {0: 44, 2: 40, 3: 40}))
        if self.nodes is not None and (text := self._graph()):
            parts.append(text)
        if self.tensors:
            parts.append("tensors\n" + "\n".join(line for one in self.tensors for line in _tensor_lines(one)))
        return "\n\n".join(parts if self else [*parts, "no difference"])

    def _graph(self) -> str:
        assert self.nodes is not None
        lines = [f"  - {name} = {self.ops.get(name, '')}" for name in self.nodes.removed]
        lines += [f"  + {name} = {self.ops.get(name, '')}" for name in self.nodes.added]
        for one in self.nodes.rewired:
            lines.append(f"  ~ {one.node} = {self.ops.get(one.node, '')}: {_shown(one.before)} -> {_shown(one.after)}")
        return "\n".join(["nodes", *lines]) if lines else ""


def _shown(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in arguments.items()) or "nothing"


def _tensor_lines(one: TensorDifference) -> list[str]:
    if not one.left:
        return [f"  {one.tensor}: {text}" for text in one.right]
    lines = [f"  {one.tensor}"]
    lines += [f"    left   {text}" for text in one.left or ("unchanged",)]
    return lines + [f"    right  {text}" for text in one.right or ("unchanged",)]


def diff(
    left: Compared,
    right: Compared | None = None,
    *,
    step: str | None = None,
    block: str | int | None = None,
    layer: str | None = None,
    model: nn.Module | type[nn.Module] | None = None,
    graph: int = 0,
) -> Difference:
    """Compare two plans, checkpoints, models or recipes; or one graph before and after a pass.

    Layers are aligned by name, nodes by what they do and where they come from, never by their numbers.

    Args:
        left: A quantized model, the folder of one, a plan, a recipe, or the text or name of a recipe.
        right: The same; None to compare the graph of ``left`` before and after ``step``.
        step: Name of a pass, such as ``absorb-affines``, or ``lower``. With ``right``: compare the graphs after this
            step; by default, those before the backend lowers them.
        block: Number of a block, such as 3, or its path: leave out everything else.
        layer: Name of a layer, or path of a module: leave out everything else.
        model: As for :func:`fxquant.rewrite_history`. Two plans without it are compared without graphs.
        graph: Number of the graph, among the graphs that calibration captured.

    Raises:
        ConfigurationError: If one of the two cannot be compared with the other, or an argument is of another type.
            A recipe has no parts, and a plan without ``model`` has no graph to compare after a step.
        UnknownNameError: If there is no such step, block or layer. The message names the nearest ones.
        CheckpointError: If a folder holds no checkpoint, or a damaged one.
    """
    check_type("step", step, (str, NoneType), "the name of a pass, or lower")
    check_type("block", block, (str, int, NoneType), "the number or path of a block")
    check_type("layer", layer, (str, NoneType), "the name of a layer")
    check_type("graph", graph, int, "the number of a graph")
    part = (None if block is None else str(block), layer)
    if right is None:
        if step is None:
            raise ConfigurationError("name a second plan, model or recipe to compare with, or a pass (step=)")
        return _of_step(rewrite_history(_source(left), model=model, graph=graph), step, *part)
    first, second = _recipe_of(left), _recipe_of(right)
    if first is not None and second is not None:
        if step is not None or block is not None or layer is not None:
            raise ConfigurationError(
                "recipes have no blocks, layers and graphs; compare them without step, block, layer"
            )
        return Difference(str(first), str(second), passes=_passes(first, second))
    if first is not None or second is not None:
        raise ConfigurationError("a recipe can be compared with another recipe only, not with a plan or a model")
    sources = _source(left), _source(right)
    plans = plan_of(sources[0]), plan_of(sources[1])
    found = _of_plans(*plans, *part, labels=(_label(left), _label(right)))
    if model is None and any(isinstance(source, Plan) for source in sources):
        if step is not None:
            raise ConfigurationError(
                f"a plan alone has no graph to compare after {step}; give the float model as well (model=), or two "
                "checkpoints"
            )
        _check_part(plans, *part)
        return found
    histories = [rewrite_history(source, model=model, graph=graph) for source in sources]
    return _with_graphs(found, histories[0], histories[1], step, *part)


def _of_plans(left: Plan, right: Plan, block: str | None, layer: str | None, labels: tuple[str, str]) -> Difference:
    names = [[name for name in (*p.layers, *p.attentions) if is_in_part(name, block, layer)] for p in (left, right)]
    passes: tuple[tuple[str | None, str | None], ...] = ()
    if left.recipe != right.recipe:
        passes = _passes(left.recipe, right.recipe)
    facts = facts_of(left, right) if block is None and layer is None else {}
    changes = [one for one in layer_changes(left, right) if is_in_part(one.name, block, layer)]
    return Difference(
        *labels,
        facts=facts,
        passes=passes,
        only_left=tuple(name for name in names[0] if name not in names[1]),
        only_right=tuple(name for name in names[1] if name not in names[0]),
        layers=tuple(changes),
    )


def _check_part(plans: tuple[Plan, Plan], block: str | None, layer: str | None) -> None:
    """Refuse a part of the model that neither of two plans has.

    Raises:
        UnknownNameError: If there is no such block or layer. The message names the nearest ones.
    """
    names = list(dict.fromkeys(name for plan in plans for name in (*plan.layers, *plan.attentions)))
    if block is not None and not any(is_in_part(name, block, None) for name in names):
        raise UnknownNameError("block", block, nearest(block, blocks_among(names)))
    if not any(is_in_part(name, block, layer) for name in names) and layer is not None:
        raise UnknownNameError("layer", layer, nearest(layer, names))


def _passes(left: Recipe | str, right: Recipe | str) -> tuple[tuple[str | None, str | None], ...]:
    """The passes that differ, aligned by name and by how often a pass of the name came before."""
    sides = []
    for recipe in (left, right):
        texts = [part.strip() for half in str(recipe).split(" ; ") for part in half.split(",") if part.strip()]
        named: dict[tuple[str, int], str] = {}
        for text in texts:
            name = text.partition("{")[0]
            named[name, sum(1 for known in named if known[0] == name)] = text
        sides.append(named)
    keys = dict.fromkeys([*sides[0], *sides[1]])
    return tuple((sides[0].get(key), sides[1].get(key)) for key in keys if sides[0].get(key) != sides[1].get(key))


def _with_graphs(
    found: Difference, left: History, right: History, step: str | None, block: str | None, layer: str | None
) -> Difference:
    ends = [_until(history, step) for history in (left, right)]
    nodes = [part_of(steps[-1].nodes, block, layer) for steps in ends]
    changes = [_changes(steps) for steps in ends]
    tensors = dict.fromkeys([*changes[0], *changes[1]])
    other = tuple(
        TensorDifference(name, *(tuple(side.get(name, ())) for side in changes))
        for name in tensors
        if changes[0].get(name) != changes[1].get(name) and is_in_part(name, block, layer)
    )
    made = differences(*nodes)
    return Difference(**{**vars(found), "nodes": made, "ops": _ops(made, *nodes), "tensors": other})


def _until(history: History, step: str | None) -> tuple[Step, ...]:
    if step is None:
        return tuple(one for one in history.steps if one.phase != "lower")
    return history.steps[: history.steps.index(history.step(step)) + 1]


def _changes(steps: tuple[Step, ...]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for step in steps:
        for change in step.tensors:
            if change.changes_numbers:
                found.setdefault(change.tensor, []).append(f"{step.name}: {change.done}")
    return found


def _of_step(history: History, name: str, block: str | None, layer: str | None) -> Difference:
    """The graph before and after one step."""
    step = history.step(name)
    before = history.steps[max(history.steps.index(step) - 1, 0)]
    sides = part_of(before.nodes, block, layer), part_of(step.nodes, block, layer)
    names = {state.name for side in sides for state in side}
    change = GraphChange(
        tuple(one for one in step.change.added if one in names),
        tuple(one for one in step.change.removed if one in names),
        tuple(one for one in step.change.rewired if one.node in names),
        {one: made for one, made in (step.change.replaced or {}).items() if one in names},
    )
    tensors = tuple(
        TensorDifference(one.tensor, (), (f"{step.name}: {one.done}",))
        for one in step.tensors
        if one.what != "made"
        if any(is_in_part(owner, block, layer) for owner in (one.tensor, *one.layers))
    )
    labels = f"the graph before {step.text}", f"the graph after {step.text}"
    return Difference(*labels, nodes=change, ops=_ops(change, *sides), tensors=tensors)


def _ops(change: GraphChange, left: Snapshot, right: Snapshot) -> dict[str, str]:
    states: dict[str, NodeState] = {state.name: state for state in (*left, *right)}
    names = [*change.added, *change.removed, *(one.node for one in change.rewired)]
    return {name: _op(states[name]) for name in names if name in states}


def _op(state: NodeState) -> str:
    roles = f" ({', '.join(f'{role} of {name}' for name, role in state.roles.items())})" if state.roles else ""
    what = f"tensor {state.target}" if state.kind == "tensor" else state.target.removeprefix("aten::")
    return what + roles


def _recipe_of(given: Compared) -> Recipe | None:
    """The recipe, if a text names one; folders come first.

    Raises:
        ConfigurationError: If the text is neither a folder nor a recipe.
    """
    if isinstance(given, Recipe):
        return given
    if not isinstance(given, str) or Path(given).is_dir() or not _is_recipe(given):
        return None
    try:
        return make_recipe(given)
    except UnknownNameError as error:
        raise ConfigurationError(f"{shortened(str(given))!r} is neither a folder nor a recipe: {error}") from None


def _is_recipe(text: str) -> bool:
    return ";" in text or ("/" not in text and "-w" in text)


def _source(given: Compared) -> Source:
    if isinstance(given, Recipe):
        raise ConfigurationError("a recipe has no graph; give a quantized model, a plan or the folder of a checkpoint")
    return plan_if_alone(given)


def _label(given: Compared) -> str:
    return str(given) if isinstance(given, (str, Path)) else type(given).__name__
