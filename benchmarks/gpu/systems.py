"""The systems to compare: bfloat16, ours, and those of other packages."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.gpu.job import Job
from benchmarks.gpu.modes import Mode


@dataclass(frozen=True)
class Made:
    """One way to make a module of a model. The systems that call the module in different modes share it.

    Attributes:
        name: Name in the table.
        make: Makes the module on the job's device.
        least_db: An SQNR below this means that the result is wrong, not only inexact.
        needs: Packages that it needs.
        lacks: Returns why it cannot be made on a device, if that is known beforehand; otherwise None.
    """

    name: str
    make: Callable[[Job], nn.Module]
    least_db: float
    needs: tuple[str, ...] = ()
    lacks: Callable[[torch.device], str | None] = lambda device: None

    def missing(self, device: torch.device) -> str | None:
        """Why the module cannot be made here; None if it can."""
        absent = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if absent:
            return f"{' and '.join(absent)} is not installed"
        return self.lacks(device)


@dataclass(frozen=True)
class System:
    """A module and a mode of calling it."""

    made: Made
    mode: Mode

    @property
    def name(self) -> str:
        """Name in the table."""
        return f"{self.made.name}, {self.mode.value}"


BF16 = Made("bf16", Job.model, least_db=25.0)
REFERENCE = System(BF16, Mode.MAX_AUTOTUNE)
"""The system that others are compared with."""


def all_systems(device: torch.device) -> list[System]:
    """Every system, the reference first; systems that share a module are adjacent.

    On CPUs, where systems are only checked, there is one eager system per module.
    """
    from benchmarks.gpu.ours import our_makings
    from benchmarks.gpu.peers import peer_makings

    found = [REFERENCE, System(BF16, Mode.EAGER)]
    found += [System(made, Mode.MAX_AUTOTUNE) for made in peer_makings()]
    for made in our_makings():
        found += [System(made, mode) for mode in (Mode.MAX_AUTOTUNE, Mode.GRAPH, Mode.COMPILED)]
    if device.type == "cuda":
        return found
    return [System(made, Mode.EAGER) for made in dict.fromkeys(system.made for system in found)]


@contextmanager
def settings_kept() -> Iterator[None]:
    """Restore global settings that a library changes; for example, torchao changes options of Inductor."""
    config, precision = torch._inductor.config.save_config(), torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        torch._inductor.config.load_config(config)
        if torch.get_float32_matmul_precision() != precision:
            torch.set_float32_matmul_precision(precision)
