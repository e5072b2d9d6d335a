"""The page of a measurement in steps, made anew from its results whenever these change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

from benchmarks.gpu.agenda import Step
from benchmarks.gpu.ledger import Entry, latest
from benchmarks.gpu.session import Row
from benchmarks.gpu.table import systems_table
from benchmarks.gpu.targets import judge

REHEARSED = (
    "**A rehearsal: small models, in Triton's interpreter and in few rounds. No number below is one of a GPU's speed.**"
)


def summary(entries: Sequence[Entry], steps: Sequence[Step]) -> str:
    """A page of markdown: targets, tables, tests and what is left.

    Args:
        entries: All results so far.
        steps: The steps in order.
    """
    machine = latest(entries, "machine").get("machine", {}).get("found", {})
    parts = ["# Measured on a GPU", _head(machine)]
    if any(entry.get("rehearsed") for entry in entries):
        parts.append(REHEARSED)
    verdicts = [[it.target, it.said, it.of] for it in judge(entries)]
    parts += ["## Targets", tabulate(verdicts, ["target", "result", "of"], tablefmt="github", disable_numparse=True)]
    parts += ["## Steps", _steps(entries, steps)]
    by_task: dict[str, list[Row]] = {}
    references: dict[str, str] = {}
    for entry in latest(entries, "row").values():
        by_task.setdefault(entry["task"], []).append(row_of(entry["row"]))
        references[entry["task"]] = entry["reference"] or references.get(entry["task"], "")
    for task, rows in by_task.items():
        parts += [f"## {task}", systems_table(rows, "github", references[task])]
    parts += ["## Tests", _tests(entries)]
    return "\n\n".join(parts) + "\n"


def row_of(data: dict[str, Any]) -> Row:
    """The row of its JSON, in which infinite numbers are text."""
    sqnr = data["sqnr_db"]
    return Row(**data | {"sqnr_db": None if sqnr is None else float(sqnr)})


def _head(machine: dict[str, Any]) -> str:
    versions = [f"{name} {number}" for name, number in machine.get("versions", {}).items()]
    return ", ".join([machine.get("device", "unknown device"), *versions, str(machine.get("date", ""))])


def _steps(entries: Sequence[Entry], steps: Sequence[Step]) -> str:
    states = latest(entries, "step")
    spent: Counter[str] = Counter()
    for entry in entries:
        if entry["kind"] == "ran":
            spent[entry["name"]] += entry["seconds"]
    lines = []
    for step in steps:
        state = states.get(step.name, {})
        text = str(state.get("text", "")).strip()
        lines.append(
            [step.name, state.get("state", "not finished"), f"{spent[step.name]:.0f}", text.replace("\n", " ")]
        )
    return tabulate(lines, ["step", "state", "seconds", ""], tablefmt="github", disable_numparse=True)


def _tests(entries: Sequence[Entry]) -> str:
    tests = latest(entries, "test")
    counts = Counter(test["outcome"] for test in tests.values())
    lines = [", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items())) or "None has ended."]
    for name, test in tests.items():
        if test["outcome"] == "failed":
            lines += ["", f"`{name}`", "", *(f"    {line}" for line in test["text"].splitlines()[-12:])]
    return "\n".join(lines)
