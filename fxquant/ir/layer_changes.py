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
from fxquant.numerics.hadamard import rotate, rotate_back

if TYPE_CHECKING:
    from fxquant.ir.time_tables import TimeTable

_CHANGES = "fxquant_layer_changes"
"""Key in ``module.meta``."""


@dataclass(frozen=True, eq=False)
class InputTurn:
    """A rotation of the input of a layer: ``x'' = (x' * signs) H``, see :func:`fxquant.numerics.hadamard.rotate`."""

    signs: Tensor
    block: int


@dataclass(frozen=True, eq=False)
class OutputTurn:
    """A rotation of the channels ``places`` ``[blocks, block]`` of the output, with these signs, of the same shape."""

    places: Tensor
    signs: Tensor

    @property
    def by(self) -> Sequence[Tensor | str]:
        """What identifies the rotation in the history of a tensor."""
        return ("rotated-rows", self.places, self.signs)

    def apply(self, values: Tensor, axis: int) -> Tensor:
        """The values, float64, with their channels along an axis rotated."""
        moved = values.double().movedim(axis, -1)
        places, block = self.places.flatten().to(values.device), self.places.shape[1]
        turned = rotate(moved[..., places], self.signs.flatten(), block)
        return moved.index_copy(-1, places, turned).movedim(-1, axis).contiguous()


@dataclass(frozen=True, eq=False)
class LayerChange:
    """How the input and output of a layer changed: ``x = columns * x' + shift`` and ``y' = rows * y + constant``.

    If the input was rotated as well, x' stands for what is rotated back, ``x' = back(x'')``. If the output was rotated,
    this was done last.

    Attributes:
        columns: Float64 ``[in]``, or one number.
        rows: Float64 ``[out]``, or one number.
        shift: Float64 rows ``[bins, in]`` by timestep; None if nothing was subtracted from the input.
        turned: How the input was rotated after that; None if it was not.
        rows_turned: How the output was rotated after that; None if it was not.
        unknown: The pass that changed the weight in another way, or None.
    """

    columns: Tensor
    rows: Tensor
    shift: TimeTable | None = None
    turned: InputTurn | None = None
    rows_turned: OutputTurn | None = None
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
        if kind == "split":  # What the weight lost, a branch beside it adds.
            continue
        turned = _turned(before, kind, factors)
        if turned is not None:
            after = turned
        elif (
            kind in ("columns", "rows")
            and _comes_first(before, kind)
            and len(factors) == 1
            and isinstance(factors[0], Tensor)
        ):
            factor = getattr(before, str(kind)) * factors[0].detach().double().cpu()
            after = replace(before, columns=factor) if kind == "columns" else replace(before, rows=factor)
        else:
            after = replace(before, unknown=before.unknown or pass_name)
        _put(module, node, after)


def _comes_first(before: LayerChange, kind: object) -> bool:
    """Whether a factor can be noted: it comes before a rotation of the same side."""
    return (before.turned if kind == "columns" else before.rows_turned) is None


def _turned(before: LayerChange, kind: object, factors: Sequence[Tensor | str]) -> LayerChange | None:
    """The change with a rotation in it, if the fold is the first rotation of that side."""
    if kind == "rotated" and before.turned is None and len(factors) == 2:
        signs, block = factors
        assert isinstance(signs, Tensor)
        return replace(before, turned=InputTurn(signs, int(block)))
    if kind == "rotated-rows" and before.rows_turned is None and len(factors) == 2:
        places, signs = factors
        assert isinstance(places, Tensor) and isinstance(signs, Tensor)
        return replace(before, rows_turned=OutputTurn(places, signs))
    return None


def note_shift(module: fx.GraphModule, node: fx.Node, table: TimeTable) -> None:
    """Note that a table of shifts, float64 rows ``[bins, in]``, was subtracted from the input of a layer."""
    before = _change_of(module, node)
    if before.turned is not None:
        signs, block = before.turned.signs, before.turned.block
        table = table.map(lambda rows: rotate_back(rows.detach().double().cpu(), signs, block))
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
