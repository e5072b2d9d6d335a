"""The systems to compare: float, ours, and those of other packages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.figures import is_installed
from benchmarks.models import Task, cast
from benchmarks.shapes import Call

Run = Callable[[Call], Tensor]
"""Runs one call and returns the model's first output, of any floating-point dtype."""


@dataclass(frozen=True)
class Stored:
    """Files that are made once, in a separate process, and loaded from a folder.

    Attributes:
        name: Name of the folder; systems with the same name share it.
        make: Makes it and writes it to the folder.
    """

    name: str
    make: Callable[[Task, Path], None]


@dataclass(frozen=True)
class System:
    """One way to run a model.

    Attributes:
        name: Name in the table.
        start: Makes the system, or loads it from the folder that ``stored`` filled, ready to be called.
        stored: Files to make beforehand, or None.
        needs: Modules of the packages that the system needs.
        main: Whether it is measured before others, in case the time does not suffice for all.
    """

    name: str
    start: Callable[[Task, Path], Run]
    stored: Stored | None = None
    needs: tuple[str, ...] = ()
    main: bool = False

    @property
    def missing(self) -> list[str]:
        """Needed packages that are not installed."""
        return [name for name in self.needs if not is_installed(name)]


REFERENCE = "eager fp32"


def _float(dtype: torch.dtype, compiled: bool) -> Callable[[Task, Path], Run]:
    def start(task: Task, folder: Path) -> Run:
        model = task.model(dtype)
        module = torch.compile(model) if compiled else model
        return lambda call: module(**cast(call, dtype))[0]

    return start


def all_systems() -> dict[str, System]:
    """Every system by name, the reference first."""
    from benchmarks.cpu.ours import our_systems
    from benchmarks.cpu.peers import peer_systems

    floats = [
        System(REFERENCE, _float(torch.float32, compiled=False)),
        System("compiled fp32", _float(torch.float32, compiled=True)),
        System("eager bf16", _float(torch.bfloat16, compiled=False)),
        System("compiled bf16", _float(torch.bfloat16, compiled=True), main=True),
    ]
    return {system.name: system for system in (*floats, *peer_systems(), *our_systems())}
