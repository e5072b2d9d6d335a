"""Sections, rows and cell texts of a report's tables."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fxquant.inspect.rows import LayerReport
from fxquant.text import block_numbers, decimal, pattern_of, size, without_numbers, wrapped

_BLOCK = re.compile(r"(.*?)\.\d+\.")


def sections(layers: Sequence[LayerReport], every: bool) -> Iterator[tuple[str, list[list[LayerReport]]]]:
    """Group layers by the block or blocks that contain them: a title, and groups that share a row.

    The title is empty for layers outside of all blocks.
    """
    groups: dict[tuple[Any, ...], list[LayerReport]] = {}
    for layer in layers:
        into = frozenset(pattern_of(name) for name in layer.absorbed_into)
        alike = (layer.role, layer.kernel, layer.precision, layer.shape, layer.cost, layer.balanced_channels)
        key = (layer.name,) if every else (pattern_of(layer.name), into, *alike, without_numbers(layer.reason))
        groups.setdefault(key, []).append(layer)
    sections: dict[tuple[str, bool], list[list[LayerReport]]] = {}
    for group in groups.values():
        block = _BLOCK.match(group[0].name)
        title = f"{block[1]}.{block_numbers(layer.name for layer in group)}" if block else ""
        sections.setdefault((title, not block and group[0].role == "final"), []).append(group)
    yield from ((title, found) for (title, _), found in sections.items())


def reasons(title: str, given: Iterable[tuple[str, str | None]]) -> str:
    """Text that lists each reason with its layers, all blocks combined; empty if no layer has a reason."""
    found: dict[str, list[str]] = {}
    for name, reason in given:
        if reason is not None:
            found.setdefault(without_numbers(reason) or "", []).append(name)
    lines = []
    for reason, names in found.items():
        patterns = Counter(pattern_of(name) for name in names)
        shown = ", ".join(f"{name} ({count}x)" if count > 1 else name for name, count in patterns.items())
        lines += wrapped(f"{shown}: {reason}")
    return f"{title}\n" + "\n".join(lines) if lines else ""


def layer_row(indent: str, group: Sequence[LayerReport], letters: Mapping[str, str]) -> list[str]:
    """The cells of one row that shows several similar layers."""
    first = group[0]
    lows = [layer.activation_low for layer in group if layer.activation_low is not None]
    highs = [layer.activation_high for layer in group if layer.activation_high is not None]
    spreads = [value for layer in group if layer.spread for value in layer.spread]
    return [
        indent + (_BLOCK.sub("", first.name, count=1) if indent else first.name),
        first.role,
        first.precision,
        size(sum(layer.bytes_after for layer in group)),
        letters[first.kernel],
        _balance(first, len(group) > 1),
        f"{min(lows):.3g}..{max(highs):.3g}" if lows else "",
        f"{min(spreads):.3g}..{max(spreads):.3g}" if spreads else "",
        span_of(layer.weight_sqnr_db for layer in group),
        span_of(layer.activation_sqnr_db for layer in group),
    ]


def _balance(layer: LayerReport, several: bool) -> str:
    """``free: norm1.linear``, with the number of balanced channels if not all channels are balanced."""
    if layer.cost is None:
        return ""
    part = "" if layer.balanced_channels in (0, layer.shape[1]) else f" {layer.balanced_channels}/{layer.shape[1]}"
    block = _BLOCK.match(layer.name)
    within = [block is not None and name.startswith(block[0]) for name in layer.absorbed_into]
    elsewhere = [name for name, own in zip(layer.absorbed_into, within, strict=True) if not own]
    # Inside of its own block a short name is enough, if it is not ambiguous.
    shorten = not any(_BLOCK.match(name) for name in elsewhere)
    names = [
        _BLOCK.sub("", name, count=1) if own and shorten else pattern_of(name) if several else name
        for name, own in zip(layer.absorbed_into, within, strict=True)
    ]
    names = list(dict.fromkeys(names))
    return f"{layer.cost}{part}: {', '.join(names)}" if names else f"{layer.cost}{part}"


def attention_bits(bits: int | None, softmax_bits: int | None) -> str:
    """Bits of the products of an attention, such as ``a8, softmax 8``."""
    return "float" if bits is None else f"a{bits}, softmax {softmax_bits}"


def span_of(values: Iterator[float | None]) -> str:
    """Text with the smallest and the largest of the known values."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    low, high = decimal(min(known)), decimal(max(known))
    return low if low == high else f"{low}..{high}"
