"""What a report shows of decisions that passes of other packages made (:mod:`fxquant.planning.pass_decisions`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fxquant.inspect.rows import DecisionReport
from fxquant.inspect.tables import span_of
from fxquant.planning.pass_decisions import PassDecisions
from fxquant.text import fitted, name_of_all, pattern_of

_LARGEST = 1e300  # Larger integers are not converted to floats, which could not hold them.


def decision_rows(decisions: PassDecisions) -> tuple[DecisionReport, ...]:
    """One row per decision, in the order in which the passes made them."""
    return tuple(
        DecisionReport(of, name, {**entry.values, **{option: described(one) for option, one in entry.tensors.items()}})
        for of, name, entry in decisions.stored()
    )


def decision_tables(rows: Sequence[DecisionReport], every: bool) -> list[str]:
    """Text of one table per pass.

    Args:
        rows: The decisions.
        every: Show one row per decision. Otherwise decisions that differ only in the number of their block and in
            numbers share a row, which shows the range of the numbers.
    """
    tables = []
    for of in dict.fromkeys(row.of for row in rows):
        own = [row for row in rows if row.of == of]
        groups: dict[tuple[Any, ...], list[DecisionReport]] = {}
        for row in own:
            others = {option: value for option, value in row.values.items() if not _is_number(value)}
            groups.setdefault((row.name,) if every else (pattern_of(row.name), str(others)), []).append(row)
        columns = [*dict.fromkeys(option for row in own for option in row.values)]
        cells = [
            [name_of_all([row.name for row in group]), *(_cell(group, column) for column in columns)]
            for group in groups.values()
        ]
        tables.append(f"decisions of {of}\n" + fitted(["of", *columns], cells, {0: 46}))
    return tables


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _cell(group: Sequence[DecisionReport], column: str) -> str:
    """A number, the range of several, or a value that the whole group shares."""
    values = [row.values[column] for row in group if column in row.values]
    if not values:
        return ""
    if all(_is_number(value) and abs(value) < _LARGEST for value in values):
        if all(isinstance(value, int) for value in values):
            return "..".join(dict.fromkeys(map(str, (min(values), max(values)))))
        return span_of(iter(values))
    return "" if values[0] is None else str(values[0])


def described(tensor: Tensor) -> str:
    """Dtype and shape of a tensor, such as ``float32[64, 64]``."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
