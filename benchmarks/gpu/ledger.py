"""The results of a measurement in steps: one line of JSON per event, on disk as soon as it is known.

A file of lines loses at most its last line when the process or the machine stops. Several processes may append.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Entry = dict[str, Any]
MOST_ATTEMPTS = 2
"""How often something is begun. If it never ends, for example because it kills its process, it is left out."""


class Ledger:
    """A file of lines.

    Args:
        path: The file; its folder must exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, kind: str, name: str, **more: Any) -> None:
        """Append an event and write it to the disk.

        Args:
            kind: What happened, such as ``row``.
            name: What it happened to.
            **more: Values that JSON has.
        """
        line = json.dumps({"kind": kind, "name": name, **more}, allow_nan=False) + "\n"
        with self.path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # A process was killed while it wrote.
                    line = "\n" + line
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[Entry]:
        """All events in their order, without lines that were cut off."""
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_bytes().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and "kind" in entry and "name" in entry:
                found.append(entry)
        return found


def latest(entries: Iterable[Entry], kind: str) -> dict[str, Entry]:
    """The last event of a kind for each name."""
    return {entry["name"]: entry for entry in entries if entry["kind"] == kind}


def attempts(entries: Iterable[Entry]) -> dict[str, int]:
    """How often each name was begun since it last ended."""
    found: dict[str, int] = {}
    for entry in entries:
        if entry["kind"] == "begin":
            found[entry["name"]] = found.get(entry["name"], 0) + 1
        elif entry["kind"] in ("row", "test"):
            found.pop(entry["name"], None)
    return found


def seconds_of(entries: Iterable[Entry], step: str) -> float:
    """Seconds that a step has run so far, in all runs."""
    return sum(float(entry["seconds"]) for entry in entries if entry["kind"] == "ran" and entry["name"] == step)


def end_with_parent() -> None:
    """End this process soon after its parent ended, so that no second run writes beside it."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(3)

    threading.Thread(target=watch, daemon=True).start()
