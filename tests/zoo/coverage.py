"""What of each tiny model is balanced, as the lines of ``docs/coverage.md``."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass

from tests.zoo.audit import Audit
from tests.zoo.models import CAPTURED, REFUSED, Entry

HEAD = """\
# Coverage

Which linears of which diffusion transformer can be balanced, and where the factors go. Every class is built tiny and
with random weights, captured, balanced and absorbed in float64; its outputs stay the same to twelve digits, or it is
not on this page. Nothing in fxquant knows any of these classes: the figures follow from the
[channel rules](channel-rules.md) alone. `make coverage` writes this page, and the tests compare it.

**linears** are those of the transformer blocks whose activations are quantized. Their factors vanish into weights
(**free**), into a multiplication of one `[batch, channels]` vector (**vector**), or they would cost a multiplication
of all tokens (**tokens**), which no recipe does unless asked. **nonlinear** counts those behind an activation function
that no factor can pass, the second linear of a plain feed-forward network, which no algebra permits. **other** counts
the rest, each with its reason below. **share** is (free + vector) / (linears - nonlinear).

"""


@dataclass(frozen=True)
class Counts:
    """Linears of one model by what balancing them costs."""

    free: int
    vector: int
    nonlinear: int
    other: int

    @property
    def linears(self) -> int:
        """All of them."""
        return self.free + self.vector + self.nonlinear + self.other

    @property
    def share(self) -> float:
        """Share of those that are balanced among those not behind an activation function."""
        return (self.free + self.vector) / (self.linears - self.nonlinear)


def counts(audit: Audit) -> Counts:
    """Count the linears of a model."""
    costs: Counter[str] = Counter()
    for layer in audit.plan.layers.values():
        if layer.balance is not None:
            nonlinear = layer.balance.cost == "not" and (layer.balance.reason or "").endswith("is nonlinear")
            costs["nonlinear" if nonlinear else layer.balance.cost] += 1
    return Counts(costs["free"], costs["vector"], costs["nonlinear"], costs["not"] + costs["tokens"])


def exceptions(audit: Audit) -> list[str]:
    """A line for each reason why linears are not balanced, blocks of a kind in one."""
    found: dict[str, list[str]] = defaultdict(list)
    for name, layer in audit.plan.layers.items():
        balance = layer.balance
        if balance is not None and balance.cost in ("not", "tokens") and not str(balance.reason).endswith("nonlinear"):
            reason = re.sub(r"\b([a-z_]+?)(?:_\d+)? \(([^)]*)\)", r"\2", str(balance.reason))
            found[_star(reason)].append(_star(name))
    return [f"{', '.join(f'`{name}`' for name in dict.fromkeys(names))}: {reason}" for reason, names in found.items()]


def _star(text: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "N", text)


def row(entry: Entry, audit: Audit) -> str:
    """The line of a model in the table."""
    c = counts(audit)
    name = entry.name + entry.variant.replace("-", ", ")
    batch = "fixed" if audit.found.static_batch else "any"
    return (
        f"| {name} | {c.linears} | {c.free} | {c.vector} | {c.nonlinear} | {c.other} | {100 * c.share:.0f}% | {batch} |"
    )


def page(audits: dict[Entry, Audit]) -> str:
    """The whole page."""
    total = [counts(audit) for audit in audits.values()]
    permitted = sum(c.linears - c.nonlinear for c in total)
    balanced = sum(c.free + c.vector for c in total)
    lines = [
        HEAD
        + f"Over all {len(audits)} models, {balanced} of {permitted} linears that no activation function stands before "
        + f"are balanced, {100 * balanced / permitted:.1f}%.\n",
        "| class | linears | free | vector | nonlinear | other | share | batch size |",
        "|---|---|---|---|---|---|---|---|",
        *(row(entry, audit) for entry, audit in audits.items()),
        "",
        "## Why not the others",
        "",
        "A linear that reads the residual stream itself, or an input of the model, has nothing before it that could",
        "take its factors without changing what others read.",
        "",
    ]
    for entry, audit in audits.items():
        lines += [f"- {entry.name}{entry.variant}: {line}" for line in exceptions(audit)]
    lines += [
        "",
        "## Classes that cannot be captured",
        "",
        "Their code branches on the values of tensors, and a graph has one path. fxquant says so, with the line.",
        "",
        *(f"- {name}, in `{where}`" for name, where in REFUSED.items()),
    ]
    return "\n".join(lines) + "\n"


__all__ = ["CAPTURED", "counts", "exceptions", "page", "row"]
