"""One small rule per op: what a request on the op's result asks of the op's inputs, or how the op meets it.

A rule is a function of the node and the :class:`~fxquant.channels.wants.Want` on its value; it looks at shapes and
arguments only, never at values. ``fxquant list rules`` prints the first line of each docstring. See
``docs/channel-rules.md`` for how to add one.
"""

from fxquant.channels.rules import arithmetic, ends, layout, matrices, rotations, shifts  # (they register)
from fxquant.channels.rules.table import (
    ROTATIONS,
    RULES,
    SHIFTS,
    STATIC_SHIFTS,
    Rule,
    outcome,
    rule,
    shape_of,
    shift_rule,
)

__all__ = [
    "ROTATIONS",
    "RULES",
    "SHIFTS",
    "STATIC_SHIFTS",
    "Rule",
    "arithmetic",
    "ends",
    "layout",
    "matrices",
    "outcome",
    "rotations",
    "rule",
    "shape_of",
    "shift_rule",
    "shifts",
]
