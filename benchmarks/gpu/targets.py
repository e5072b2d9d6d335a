"""Judges the rows of a measurement in steps against the targets of the native backend on GPUs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.agenda import DIT_2, DIT_16, FLUX
from benchmarks.gpu.ledger import Entry, latest

Rows = Sequence[dict[str, Any]]
_EIGHT_BITS = ("native W8A8 int8", "native W8A8 fp8")
_GRAPH = "CUDA graph"


@dataclass(frozen=True)
class Verdict:
    """One target and what was measured.

    Attributes:
        target: Description with the bound.
        bound: The bound.
        found: The measured number; None if a row that it needs is missing.
        most: Whether the bound is the most that is allowed, not the least.
        of: The rows that were compared.
    """

    target: str
    bound: float
    found: float | None
    most: bool = False
    of: str = ""

    @property
    def passed(self) -> bool | None:
        """Whether the target is met; None if that is not known."""
        if self.found is None:
            return None
        return self.found <= self.bound if self.most else self.found >= self.bound

    @property
    def said(self) -> str:
        """The result in a few words."""
        if self.found is None:
            return "not measured"
        if self.passed:
            return f"pass: {self.found:.3f}"
        return f"short by {abs(self.found - self.bound):.3f}: {self.found:.3f}"


def judge(entries: Sequence[Entry]) -> list[Verdict]:
    """All targets, with the rows that were measured so far."""
    by_task: dict[str, list[Entry]] = {}
    for entry in latest(entries, "row").values():
        if entry["row"]["failed"] is None and entry["row"]["seconds"]:
            by_task.setdefault(entry["task"], []).append(entry)
    found: list[Verdict] = []
    for task in (DIT_16, FLUX):
        of = _Speeds(by_task.get(task, []))
        ours = of.fastest(_starts(*_EIGHT_BITS))
        found += [
            of.verdict(f"{task}: W8A8 or fp8 at least 1.5 x compiled bf16", 1.5, ours, of.fastest(_starts("bf16"))),
            of.verdict(f"{task}: W8A8 or fp8 at least 1.1 x the fastest torchao", 1.1, ours,
                       of.fastest(_starts("torchao"))),
            of.weights(f"{task}: weights of W4A8 at most 0.30 of bf16", 0.30, "native W4A8,", "bf16"),
            of.verdict(f"{task}: W4A8 at least 0.85 x the speed of W8A8", 0.85, of.fastest(_starts("native W4A8,")),
                       of.fastest(_starts(_EIGHT_BITS[0]))),
        ]  # fmt: skip
    of = _Speeds(by_task.get(DIT_2, []))
    recorded = of.fastest(lambda name: name.startswith(_EIGHT_BITS) and name.endswith(_GRAPH))
    target = f"{DIT_2}: W8A8 or fp8 with CUDA graphs at least 1.1 x compiled bf16"
    return [*found, of.verdict(target, 1.1, recorded, of.fastest(_starts("bf16")))]


def _starts(*names: str) -> Callable[[str], bool]:
    return lambda name: name.startswith(names)


class _Speeds:
    """The rows of one task with their speeds.

    Speeds are relative to the reference, which every run measures, so that rows of several runs can be compared. If
    runs had several references, speeds are calls per second.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        one = len({entry["reference"] for entry in entries}) == 1
        self._rows = {entry["row"]["system"]: entry["row"] for entry in entries}
        self._speeds = {
            name: statistics.median(row["ratios"]) if one and row["ratios"] else 1 / statistics.median(row["seconds"])
            for name, row in self._rows.items()
        }

    def fastest(self, wanted: Callable[[str], bool]) -> str | None:
        """The fastest row whose name is wanted."""
        return max(filter(wanted, self._speeds), key=self._speeds.__getitem__, default=None)

    def verdict(self, target: str, bound: float, one: str | None, other: str | None) -> Verdict:
        """Compare the speeds of two rows."""
        if one is None or other is None:
            return Verdict(target, bound, None)
        return Verdict(target, bound, self._speeds[one] / self._speeds[other], of=f"{one} / {other}")

    def weights(self, target: str, bound: float, one: str, other: str) -> Verdict:
        """Compare the bytes of two models."""
        held = {name: row["weights"] for name, row in self._rows.items() if row["weights"]}
        sizes = [next((size for name, size in held.items() if name.startswith(start)), None) for start in (one, other)]
        if sizes[0] is None or sizes[1] is None:
            return Verdict(target, bound, None, most=True)
        return Verdict(target, bound, sizes[0] / sizes[1], most=True, of=f"{one.rstrip(',')} / {other}")
