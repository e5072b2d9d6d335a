"""Extension of griffe: makes Markdown of docstrings.

Sphinx roles become links, literal blocks become blocks of code, and tables of two columns become tables.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import AliasResolutionError, Extension, Module, NameResolutionError, Object

_ROLE = re.compile(r":(?:mod|class|func|meth|attr|data|exc|obj):`(?P<short>~?)(?P<name>[\w.]+)`")
_TABLE = re.compile(r"^(?P<rule>=+  )=+$\n(?P<rows>.*?)^=+  =+$", flags=re.M | re.S)
_LITERAL = re.compile(r"::(?=\n\s*\n)")


class Roles(Extension):
    """Rewrites the docstrings of a package."""

    def on_package(self, *, pkg: Module, **kwargs: Any) -> None:
        """Rewrite all docstrings, once names can be resolved."""
        self._walk(pkg)

    def _walk(self, item: Object) -> None:
        if item.docstring is not None:
            text = _ROLE.sub(lambda role: _link(item, role), item.docstring.value)
            item.docstring.value = _TABLE.sub(_table, _LITERAL.sub(":", text))
        for member in item.members.values():
            if not member.is_alias:
                self._walk(member)


def _table(table: re.Match[str]) -> str:
    rows: list[list[str]] = []
    for line in table["rows"].splitlines():
        left, right = line[: len(table["rule"])].strip(), line[len(table["rule"]) :].strip()
        if left:
            rows.append([left, right])
        else:  # The second column goes on.
            rows[-1][1] += f" {right}"
    return "\n".join(["| | |", "|---|---|", *(f"| {left} | {right} |" for left, right in rows)])


def _link(item: Object, role: re.Match[str]) -> str:
    name = role["name"]
    shown = name.rpartition(".")[2] if role["short"] else name
    first, *rest = name.split(".")
    try:
        path = ".".join([item.resolve(first), *rest])
    except (NameResolutionError, AliasResolutionError):
        path = name
    return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'
