"""The table of rules, and the helpers that rules share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from fxquant.channels.layouts import broadcast_back
from fxquant.channels.wants import Barrier, Choose, End, Outcome, Push, Tie, Want
from fxquant.errors import DuplicateNameError
from fxquant.ir import ops as _ops  # noqa: F401  (registers the ops that rules are for)
from fxquant.ir.names import op_name

aten = torch.ops.aten
Rule = Callable[[fx.Node, Want], Outcome]

RULES: dict[Any, Rule] = {}
"""The rule of each op, keyed by ``node.target``; ``"get_attr"`` and ``"placeholder"`` stand for those node kinds."""

SHIFTS: dict[Any, Rule] = {}
"""Rules for the request that a value yield ``x + c`` per channel, where c depends on the timestep.

The variables of such a want are shifts c instead of factors, and its offsets are 0.
"""

STATIC_SHIFTS: dict[Any, Rule] = {}
"""Additional rules for shifts that are the same at every timestep."""

ROTATIONS: dict[Any, Rule] = {}
"""Rules for rotations of blocks of channels; see :mod:`fxquant.channels.rules.rotations`."""


def rule(*targets: Any, shifts: bool = False) -> Callable[[Rule], Rule]:
    """Register the rule of one or several ops.

    Args:
        targets: The ops.
        shifts: Whether a shift moves through them exactly as a factor does.

    Raises:
        DuplicateNameError: If one of them has a rule already.
    """

    def decorate(function: Rule) -> Rule:
        for target in targets:
            if target in RULES:
                raise DuplicateNameError(f"op {target} already has the channel rule {RULES[target].__name__!r}")
            RULES[target] = function
            if shifts:
                SHIFTS[target] = function
        return function

    return decorate


def shift_rule(*targets: Any, table: dict[Any, Rule] = SHIFTS) -> Callable[[Rule], Rule]:
    """Register the rule of one or several ops for shifts only."""

    def decorate(function: Rule) -> Rule:
        for target in targets:
            if target in table:
                raise DuplicateNameError(f"op {target} already has the shift rule {table[target].__name__!r}")
            table[target] = function
        return function

    return decorate


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """Shape of a node's value; symbolic sizes stay symbolic."""
    return tuple(node.meta["val"].shape)


def outcome(node: fx.Node, want: Want, rules: Mapping[Any, Rule] = RULES) -> Outcome:
    """Apply the rule of a node's op; an op without a rule is a barrier, and so is a value of integers."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return Barrier(f"{node.name} is not a floating-point tensor")
    key = node.target if node.op == "call_function" else node.op
    found = rules.get(key)
    if found is None:
        return Barrier(f"{op_name(node.target)} has no channel rule")
    result = found(node, want)
    if isinstance(result, Choose):
        ways = [way for way in result.ways if _meets_every_use(node, way)]
        return Choose(ways) if ways else _read_twice(node)
    if isinstance(result, Push) and not _meets_every_use(node, result):
        return _read_twice(node)
    if isinstance(result, End) and max(Counter(_arguments(node)).values(), default=1) > 1:
        return _read_twice(node)  # One parameter as weight and bias: a fold would change both at once.
    return result


def _meets_every_use(node: fx.Node, way: Push) -> bool:
    """Whether the way scales each of its inputs as often as the node reads it; ``x * x``, for one, reads x twice."""
    uses = Counter(_arguments(node))
    return all(uses[source] in (0, asked) for source, asked in Counter(source for source, _ in way.inputs).items())


def _arguments(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    map_arg((node.args, dict(node.kwargs)), found.append)
    return found


def _read_twice(node: fx.Node) -> Barrier:
    names = ", ".join(source.name for source, uses in Counter(_arguments(node)).items() if uses > 1)
    return Barrier(f"{op_name(node.target)} reads {names} more than once")


def tied(want: Want, axes: Iterable[int], reason: str) -> Tie | Barrier | None:
    """The request with one factor along these axes; None if it already has one factor there."""
    axes = [axis for axis in axes if want.varies(axis)]
    if not axes:
        return None
    one = want
    for axis in axes:
        one = one.map(lambda array, axis=axis: np.take(array, [0], axis=axis))  # type: ignore[misc]
    if (want.offset != one.offset).any():
        return Barrier(reason)
    return Tie(one, [(want.scale, np.broadcast_to(one.scale, want.scale.shape))], reason)


def elementwise(node: fx.Node, operand: Any, want: Want) -> list[tuple[fx.Node, Want]] | None:
    """The request on one operand of an elementwise op; empty for a number, None if it cannot be expressed."""
    if not isinstance(operand, fx.Node) or not isinstance(operand.meta.get("val"), Tensor):
        return []
    moved = broadcast_back(want, shape_of(operand))
    if moved is None and operand.op == "get_attr":  # A parameter can be expanded to the elements that it lacks.
        extra = want.scale.ndim - len(shape_of(operand))
        if not any(want.varies(axis) for axis in range(extra)):
            moved = want.map(lambda array: array.reshape(array.shape[extra:]))
    return None if moved is None else [(operand, moved)]


def axis_of(node: fx.Node, axis: int) -> int:
    """An axis of a node's value, as a non-negative index."""
    return axis % max(len(shape_of(node)), 1)  # Most ops accept axis 0 for a value without axes.


def cannot_broadcast(node: fx.Node) -> Barrier:
    """The barrier for an operand that has one element for all channels."""
    return Barrier(f"an operand of {op_name(node.target)} is broadcast along the channels")
