"""Formats what is balanced in each tiny model as ``docs/coverage.md``."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from fxquant.planning.kinds import KINDS, kinds
from tests.zoo.audit import Audit
from tests.zoo.models import CAPTURED, NOT_TRANSFORMERS, REFUSED, Entry

HEAD = """\
# Coverage

Which linears of which diffusion transformer can be balanced, and where the factors go. Every class is built tiny and
with random weights, captured, balanced and absorbed in float64; its outputs stay the same to twelve digits, or it is
not on this page. Nothing in fxquant knows any of these classes: the figures follow from the
[channel rules](channel-rules.md) alone. `make coverage` writes this page, and the tests compare it.

**linears** are those of the transformer blocks whose activations are quantized. Their factors vanish into weights
(**free**), or into a multiplication of one `[batch, channels]` vector (**vector**). **nonlinear** counts those behind
an activation function that no factor can pass, the second linear of a plain feed-forward network, which no algebra
permits. **other** counts the rest, each with its reason below. **tokens** is how many of nonlinear and other can be
balanced all the same, in all channels, where an activation may be multiplied at run time on all of its tokens, which
no recipe does unless it is told to (`dearest=tokens`). **share** is (free + vector) / (linears - nonlinear).

"""

BY_KIND = """\
## By what the linears are for

Read off the graph as well: what a linear reads and makes is followed to the next linear. A linear that makes both
q, k, v and the first half of a feed-forward network counts as the former, one that reads attention and feed-forward
together as an attention output.

| kind | linears | free | vector | nonlinear | other | tokens | balanced |
|---|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Counts:
    """Numbers of linears of one model, by the cost of balancing them."""

    free: int
    vector: int
    nonlinear: int
    other: int
    tokens: int

    @property
    def linears(self) -> int:
        """The number of all linears."""
        return self.free + self.vector + self.nonlinear + self.other

    @property
    def share(self) -> float:
        """Share of balanced linears among those that do not follow an activation function."""
        return (self.free + self.vector) / (self.linears - self.nonlinear)


def counts(audit: Audit, kind: str | None = None) -> Counts:
    """Count the linears of a model, or those of one kind."""
    costs: Counter[str] = Counter()
    kind_of = kinds(audit.found.module.graph) if kind else {}
    for name, layer in audit.plan.layers.items():
        if layer.balance is not None and kind_of.get(name) == kind:
            nonlinear = layer.balance.cost == "not" and (layer.balance.reason or "").endswith("is nonlinear")
            costs["nonlinear" if nonlinear else layer.balance.cost] += 1
            costs["tokens"] += layer.balance.cost == "not" and name in audit.tokens
    return Counts(costs["free"], costs["vector"], costs["nonlinear"], costs["not"], costs["tokens"])


def kind_row(audits: Iterable[Audit], kind: str) -> str:
    """The line of a kind of linears in the second table."""
    every = [counts(audit, kind) for audit in audits]
    free, vector, nonlinear, other, tokens = (
        sum(getattr(c, name) for c in every) for name in ("free", "vector", "nonlinear", "other", "tokens")
    )
    linears = free + vector + nonlinear + other
    share = f"{100 * (free + vector) / linears:.1f}%" if linears else ""
    return f"| {kind} | {linears} | {free} | {vector} | {nonlinear} | {other} | {tokens} | {share} |"


def exceptions(audit: Audit) -> list[str]:
    """One line for each reason why linears are not balanced; equal layers of all blocks share a line."""
    found: dict[str, list[str]] = defaultdict(list)
    for name, layer in audit.plan.layers.items():
        balance = layer.balance
        if balance is not None and balance.cost == "not" and not str(balance.reason).endswith("nonlinear"):
            found[_star(_readable(str(balance.reason)))].append(_star(name))
    return [f"{', '.join(f'`{name}`' for name in dict.fromkeys(names))}: {reason}" for reason, names in found.items()]


def _readable(reason: str) -> str:
    """A reason that names operations by their module instead of by node names."""

    def place(found: re.Match[str]) -> str:
        module, _, op = found[1].rpartition(".")
        return f"`{op.strip('_')}` in `{module}`" if module else f"`{op.strip('_')}`"

    return re.sub(r"\b\w+ \(([^)]*)\)", place, reason)


def _star(text: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|`)", "N", text)


def title(entry: Entry) -> str:
    """The name of a model in the table."""
    return entry.name + entry.variant.replace("-", ", ", 1).replace("-", " ")


def summary(models: int, balanced: int, permitted: int) -> str:
    """The line above the table."""
    return (
        f"Over all {models} models, {balanced} of {permitted} linears that no activation function stands before "
        f"are balanced, {100 * balanced / permitted:.1f}%."
    )


def row(entry: Entry, audit: Audit) -> str:
    """The line of a model in the table."""
    c, name = counts(audit), title(entry)
    batch = "fixed" if audit.found.static_batch else "any"
    cells = (name, c.linears, c.free, c.vector, c.nonlinear, c.other, c.tokens, f"{100 * c.share:.0f}%", batch)
    return f"| {' | '.join(map(str, cells))} |"


def page(audits: dict[Entry, Audit]) -> str:
    """The whole page."""
    total = [counts(audit) for audit in audits.values()]
    permitted = sum(c.linears - c.nonlinear for c in total)
    balanced = sum(c.free + c.vector for c in total)
    lines = [
        f"{HEAD}{summary(len(audits), balanced, permitted)}\n",
        "| class | linears | free | vector | nonlinear | other | tokens | share | batch size |",
        "|---|---|---|---|---|---|---|---|---|",
        *(row(entry, audit) for entry, audit in audits.items()),
        "",
        BY_KIND + "\n".join(kind_row(audits.values(), kind) for kind in KINDS),
        "",
        "## Why not the others",
        "",
        "A linear that reads the residual stream itself, or an input of the model, has nothing before it that could",
        "take its factors without changing what others read. `N` is the number of a block.",
        "",
    ]
    for entry, audit in audits.items():
        lines += [f"- {entry.name}{entry.variant}: {line}" for line in exceptions(audit)]
    lines += [
        "",
        "**batch size** is *fixed* where a graph serves one batch size and other calls get graphs of their own, which",
        "share the weights. The report says so and why: a model branches on what a mask holds, or its code fixes it.",
        "So do calls with a list that has an item for each sample, such as QwenImage's `img_shapes`.",
        "",
        "## Models that cannot be captured",
        "",
        "Their code branches on values that are not known when it is traced, or runs functions with graphs of their",
        "own, or keeps state in an object. fxquant says so, with the line if there is one. HiDream's router sends each",
        "token to some experts; where each expert sees all tokens and its result is weighted by the router, which is",
        "the same function, it is captured like any other (the row *all experts*).",
        "",
        *(f"- {name}: {refusal.reason}" for name, refusal in REFUSED.items()),
        "",
        "These classes of diffusers are not diffusion transformers of images, videos or sound:",
        "",
        *(f"- {name}: {reason}" for name, reason in NOT_TRANSFORMERS.items()),
    ]
    return "\n".join(lines) + "\n"


__all__ = ["CAPTURED", "HEAD", "counts", "exceptions", "page", "row", "summary", "title"]
