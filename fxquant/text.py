"""Text functions that reports share: tables that fit a page, numbers with units, values for strict JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from tabulate import tabulate

WIDTH = 140
"""Characters per line of a page."""

_CELL = 2000  # The most characters of a table cell.
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")  # The number of a block in the name of a layer.
_NODE_NUMBER = re.compile(r"(?<![.\w])([a-z][a-z_]*?)_\d+(?![.\w])")  # The number of a graph node, as in add_12.


def printable(text: str, longest: int | None = None) -> str:
    """Text without characters that control a terminal, such as escapes; lines that are too long are cut.

    Names of layers and parts come from files, and files may come from untrusted sources.

    Args:
        text: May have several lines.
        longest: The most characters that are kept per line; None for all.
    """
    if longest is not None:
        text = "\n".join(
            line if len(line) <= longest else f"{line[:longest]}... ({len(line) - longest} more characters)"
            for line in text.split("\n")
        )
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def pattern_of(name: str) -> str:
    """A layer's name, or a node's, with the number of its block left out: ``blocks.*.attn1.to_q``."""
    return _NUMBER.sub("*", name, count=1) if "." in name else _NODE_NUMBER.sub(r"\1", name)


def is_inside(name: str, module: str) -> bool:
    """Whether a name is that of a module, or of a layer, tensor or other module in it."""
    return name == module or name.startswith(f"{module}.")


def without_numbers(reason: str | None) -> str | None:
    """A reason without the numbers of nodes, so that it reads the same for every block."""
    return None if reason is None else _NODE_NUMBER.sub(r"\1", reason)


def of_any_block(text: str) -> str:
    """A text about layers and nodes without the numbers of blocks and nodes."""
    return _NUMBER.sub("*", _NODE_NUMBER.sub(r"\1", text))


def letter(number: int) -> str:
    """A to Z, then A1 and so on."""
    return chr(ord("A") + number % 26) + (str(number // 26) if number >= 26 else "")


def block_numbers(names: Iterable[str]) -> str:
    """The numbers of the blocks in these names, as in ``0-7`` or ``0,2-7``."""
    found = sorted({int(match[0]) for name in names if (match := _NUMBER.search(name))})
    runs: list[list[int]] = []
    for number in found:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def name_of_all(names: Sequence[str]) -> str:
    """One name for layers that differ only in the number of their block: ``blocks.0-7.attn1.to_q``."""
    return _NUMBER.sub(block_numbers(names), names[0], count=1) if len(names) > 1 else names[0]


def decimal(value: float) -> str:
    """The number with one digit after the decimal point, or ``inf``."""
    return f"{value:.1f}" if math.isfinite(value) else str(value)


def size(count: float) -> str:
    """A number of bytes, in a suitable unit."""
    value, unit = float(count), "bytes"
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"


def fitted(header: Sequence[str], rows: Sequence[Sequence[Any]], widths: dict[int, int], right: Any = ()) -> str:
    """A table without empty columns; wide columns are wrapped until the table fits the page."""
    kept = [i for i in range(len(header)) if any(str(row[i]) for row in rows)]
    limits = dict(widths)
    while True:
        cells = [[_broken(printable(str(row[i]), _CELL), limits.get(i)) for i in kept] for row in rows]
        align = ["right" if i in right else "left" for i in kept]
        text = tabulate(
            cells,
            [header[i] for i in kept],
            tablefmt="simple",
            disable_numparse=True,
            preserve_whitespace=True,
            colalign=align if rows else None,
        )
        if max((len(line) for line in text.splitlines()), default=0) <= WIDTH:
            return text
        widest = max((i for i in kept if i in limits), key=lambda i: limits[i], default=None)
        if widest is None or limits[widest] <= 12:
            return text
        limits[widest] -= 2


def _broken(text: str, width: int | None) -> str:
    """Text in lines of at most ``width`` characters, broken after spaces, dots, commas and slashes where possible."""
    if width is None or len(text) <= width:
        return text
    indent = text[: len(text) - len(text.lstrip())]
    lines, line = [], indent
    for piece in re.findall(r"[^ .,/]+[ .,/]*", text):
        rest = piece
        while len(line) + len(rest.rstrip()) > width:
            if line.strip():
                lines.append(line.rstrip())
            else:
                lines.append(line + rest[: width - len(line)])
                rest = rest[width - len(line) :]
            line = indent + "  "
        line += rest
    return "\n".join([*lines, line.rstrip()] if line.strip() else lines)


def wrapped(text: str) -> list[str]:
    """Text as indented lines that fit the page; lines from the second on are indented further."""
    first, *rest = _broken(printable(text, _CELL), WIDTH - 4).splitlines()
    return [f"  {first}", *(f"    {line}" for line in rest)]


def json_values(value: Any) -> Any:
    """A value for strict JSON: numbers that are not finite become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): json_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_values(item) for item in value]
    return value


def nearest(name: str, known: Iterable[str], count: int = 5) -> list[str]:
    """The known names that are most like a name, for messages; all of them if none is similar or there are few."""
    names = list(dict.fromkeys(known))
    if len(names) <= 2 * count:
        return names
    return get_close_matches(name, names, n=count, cutoff=0.3) or names
