"""What passes did to the input and the output of each layer of a graph, so that a branch beside it can do the same.

A pass that balances or shifts channels changes the input x of a layer to x' and undoes that in the weight; a pass that
absorbs a factor scales rows of the weight, and so the output y to y'. A branch ``B (A x)`` in the coordinates of the
original model reads x' and is added to y'. So the exact factors are kept with the graph while passes rewrite it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from fxquant.ir.layers import LAYER_OPS, is_cast, stored_weight
from fxquant.ir.meta import LAYER

if TYPE_CHECKING:
    from fxquant.ir.time_tables import TimeTable

_CHANGES = "fxquant_layer_changes"
"""Key in ``module.meta``."""


@dataclass(frozen=True, eq=False)
class LayerChange:
    """How the input and output of a layer changed: ``x = columns * x' + shift`` and ``y' = rows * y + constant``.

    Attributes:
        columns: Float64 ``[in]``, or one number.
        rows: Float64 ``[out]``, or one number.
        shift: Float64 rows ``[bins, in]`` by timestep; None if nothing was subtracted from the input.
        unknown: The pass that changed the weight in another way, or None.
    """

    columns: Tensor
    rows: Tensor
    shift: TimeTable | None = None
    unknown: str | None = None

    @classmethod
    def none(cls) -> LayerChange:
        """No change."""
        one = torch.ones((), dtype=torch.float64)
        return cls(one, one)


def take_changes(module: fx.GraphModule) -> dict[str, LayerChange]:
    """What passes did to the layers of a graph, by layer; forgotten by the graph, which may be copied afterwards."""
    found: dict[str, LayerChange] = module.meta.pop(_CHANGES, {})
    return found


def note_fold(module: fx.GraphModule, attribute: fx.Node, by: Sequence[Tensor | str], pass_name: str) -> None:
    """Note a fold into a parameter, if it is the weight of layers; ``by`` as in :meth:`Rewriter.fold`."""
    kind, factors = (by[0], by[1:]) if by else (pass_name, ())
    for node in _readers(attribute):
        if LAYER not in node.meta or node.target not in LAYER_OPS or stored_weight(node) is not attribute:
            continue
        before = _change_of(module, node)
        if kind in ("columns", "rows") and len(factors) == 1 and isinstance(factors[0], Tensor):
            factor = getattr(before, str(kind)) * factors[0].detach().double().cpu()
            after = replace(before, columns=factor) if kind == "columns" else replace(before, rows=factor)
        else:
            after = replace(before, unknown=before.unknown or pass_name)
        _put(module, node, after)


def note_shift(module: fx.GraphModule, node: fx.Node, table: TimeTable) -> None:
    """Note that a table of shifts, float64 rows ``[bins, in]``, was subtracted from the input of a layer."""
    before = _change_of(module, node)
    table = table.map(lambda rows: rows.detach().double().cpu() * before.columns)
    _put(module, node, replace(before, shift=table if before.shift is None else before.shift.plus(table)))


def note_rows(module: fx.GraphModule, node: fx.Node, factor: Tensor) -> None:
    """Note that a layer reads a stored form of its weight, whose rows differ by a factor, ``[out]`` or a number."""
    if LAYER in node.meta:
        before = _change_of(module, node)
        _put(module, node, replace(before, rows=before.rows * factor.detach().double().cpu()))


def _change_of(module: fx.GraphModule, node: fx.Node) -> LayerChange:
    found: LayerChange = module.meta.get(_CHANGES, {}).get(node.meta[LAYER], LayerChange.none())
    return found


def _put(module: fx.GraphModule, node: fx.Node, change: LayerChange) -> None:
    module.meta.setdefault(_CHANGES, {})[node.meta[LAYER]] = change


def _readers(attribute: fx.Node) -> list[fx.Node]:
    """The ops that read a parameter, directly or through casts."""
    found = []
    for user in attribute.users:
        if user.op == "call_function":
            found += _readers(user) if is_cast(user) else [user]
    return found
