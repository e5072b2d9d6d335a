"""Whole models of a measurement in steps: what was measured in an earlier run is not measured again."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import nn

from benchmarks.gpu.agenda import Task
from benchmarks.gpu.job import Job, free
from benchmarks.gpu.ledger import MOST_ATTEMPTS, Entry, Ledger, attempts, latest
from benchmarks.gpu.modes import Mode
from benchmarks.gpu.ours import our_makings
from benchmarks.gpu.peers import peer_makings
from benchmarks.gpu.session import Row, Session
from benchmarks.gpu.systems import BF16, System
from benchmarks.gpu.table import row_to_json
from benchmarks.models import task_of

MEASURED = (
    "native W8A8 int8",
    "torchao int8 dynamic",
    "native W8A8 fp8",
    "torchao fp8 dynamic, per row",
    "native W4A8",
    "native W4A16-g64",
    "torchao int4 weight-only",
)
"""The quantized models, the most important first."""
NOT_INSTALLED = "not installed"
"""Part of the reason why a system fails whose package is missing. The package may be there in the next run."""
Kept = dict[str, tuple[nn.Module, int | None]]


def systems_of(task: Task) -> list[System]:
    """The systems of a task in order; the first two are bfloat16, with which the others are compared."""
    known = {made.name: made for made in (*our_makings(), *peer_makings())}
    makings = [BF16, *(known[name] for name in MEASURED[: task.most])]
    modes = (Mode.BLOCKS_GRAPH, Mode.BLOCKS) if task.blocks else (Mode.COMPILED_GRAPH, Mode.COMPILED)
    return [System(made, mode) for made in makings for mode in (modes if task.plain or made is BF16 else modes[:1])]


def name_in(task: Task, system: str) -> str:
    """The name of a row in the results."""
    return f"{task.name}: {system}"


def to_measure(task: Task, systems: Sequence[System], entries: Sequence[Entry]) -> tuple[System | None, list[System]]:
    """The reference, and the systems that are still to be measured.

    The reference is the first system in bfloat16 that did not fail; None if both did.
    """
    known = latest(entries, "row")
    named = {system: known.get(name_in(task, system.name)) for system in systems}
    rows = {system: entry["row"] for system, entry in named.items() if entry is not None}
    reference = next((system for system in systems[:2] if rows.get(system, {}).get("failed") is None), None)
    left = [
        system
        for system in systems
        if system not in rows
        # Its package is there now.
        or (str(rows[system]["failed"]).endswith(NOT_INSTALLED) and all(map(find_spec, system.made.needs)))
    ]
    return reference, left


def give_up(task: Task, systems: Sequence[System], ledger: Ledger) -> None:
    """Record a failure of each system that was begun several times and never ended."""
    begun = attempts(ledger.read())
    for system in systems:
        name = name_in(task, system.name)
        if begun.get(name, 0) >= MOST_ATTEMPTS:
            row = Row(system.name, failed=f"the process ended each of the {begun[name]} times that it was begun")
            ledger.add("row", name, task=task.name, reference="", rehearsed=False, row=row_to_json(row))


def measure_tasks(tasks: Sequence[Task], ledger: Ledger, device: torch.device, deadline: float, rehearse: bool) -> bool:
    """Measure what is left of some models, and return whether nothing is left that could be measured here.

    Args:
        tasks: The models, in order.
        ledger: The results so far, and new ones.
        device: The device.
        deadline: Time, as of :func:`time.monotonic`, after which nothing new is begun.
        rehearse: Whether blocks are traced but not compiled, in few rounds.
    """
    kept: dict[str, Kept] = {}
    # Models that come again with other batches are kept: the same module serves them.
    for number, task in enumerate(tasks):
        shared = kept.setdefault(task.model, {})
        while time.monotonic() < deadline:
            if not _measure(task, ledger, device, deadline, rehearse, shared):
                break
        if all(later.model != task.model for later in tasks[number + 1 :]):
            del kept[task.model], shared
            free()
    return all(_finished(task, ledger) for task in tasks)


def _finished(task: Task, ledger: Ledger) -> bool:
    reference, left = to_measure(task, systems_of(task), ledger.read())
    return reference is None or not left


def _measure(task: Task, ledger: Ledger, device: torch.device, deadline: float, rehearse: bool, kept: Kept) -> bool:
    """Run one session, and return whether another one could measure more."""
    systems = systems_of(task)
    give_up(task, systems, ledger)
    reference, left = to_measure(task, systems, ledger.read())
    others = [system for system in left if system is not reference]
    if reference is None or not left:
        return False
    longest = 0.0
    begun: set[str] = set()
    written: dict[str, Row] = {}

    def begins(system: str) -> None:
        begun.add(system)
        ledger.add("begin", name_in(task, system))

    def ended() -> bool:
        return time.monotonic() + longest > deadline

    def changed(rows: list[Row]) -> None:
        nonlocal longest
        longest = max([longest, *(row.started or 0.0 for row in rows)])
        for row in rows:
            done = row.system in begun and (row.seconds or row.failed is not None)
            if done and written.get(row.system) != row:
                written[row.system] = dataclasses.replace(row, seconds=[*row.seconds], ratios=[*row.ratios])
                more = {"task": task.name, "reference": reference.name, "rehearsed": rehearse}
                ledger.add("row", name_in(task, row.system), **more, row=row_to_json(row))

    session = Session(
        Job(task_of(task.model, task.batch), device),
        rounds=1 if rehearse else 15,
        ended=ended,
        changed=changed,
        begins=begins,
        kept=kept,
        compiler="eager" if rehearse else "inductor",
    )
    session.measure([reference, *others])
    changed(session.rows)
    failed = written.get(reference.name)
    return failed is not None and failed.failed is not None
