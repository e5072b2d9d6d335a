"""Instruments that write graphs to files: after every change, or just before a pass that fails.

Each graph is written as text for people, and as a dump that ``fxquant opt`` reads (:mod:`fxquant.ir.dumps`), with the
plan and, after a failure, the statistics that passes decide from.
"""

from __future__ import annotations

import copy
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from fxquant.disk.refusals import writing
from fxquant.disk.whole_file import whole_file
from fxquant.errors import ConfigurationError
from fxquant.ir.dumps import LARGEST, Dump, dump_of
from fxquant.ir.printing import graph_text
from fxquant.ir.stages import Stage, homes_of, later
from fxquant.ir.tensors import read_tensors
from fxquant.pipeline.pipeline import Instrument, Pass, PassRecord
from fxquant.planning.context import PassContext
from fxquant.planning.plan import Plan
from fxquant.registry import OWN

VARIABLE = "FXQUANT_DUMP"
"""Environment variable that names a folder for :class:`DumpGraphs`."""

PLAN_ENDING = ".plan"
STATISTICS_ENDING = ".statistics.safetensors"
_SCRIPT = "__main__"  # Cannot be imported by another process.
_MOST_BYTES = 64 * 2**20  # A reproducer of a model up to this size holds the weights.


def with_dumps(instruments: Sequence[Instrument]) -> list[Instrument]:
    """The instruments, and one that dumps graphs if the environment variable ``FXQUANT_DUMP`` names a folder."""
    folder = os.environ.get(VARIABLE)
    return [*instruments, DumpGraphs(folder)] if folder else [*instruments]


class DumpGraphs:
    """Instrument that writes the graph after each pass that changed it, and after the backend lowered it.

    Files are named ``00-captured``, ``01-balance-channels`` and so on. Of each graph there is a text (``.txt``,
    :mod:`fxquant.ir.printing`), a dump (``.json`` and ``.safetensors``), and the plan as it was then (``.plan``).
    Weights are written as shapes only. The first graph of a model goes to the folder itself, and further ones to
    ``graph-1`` and so on in it.

    Args:
        folder: Where the files go; created with its parents.

    Raises:
        WriteError: If the folder cannot be made, or a file is in its place.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._numbers: WeakKeyDictionary[fx.GraphModule, list[int]] = WeakKeyDictionary()
        self._stage = Stage.CAPTURED
        self._plan: Plan | None = None

    def enter(self, step: Pass, context: PassContext, stage: Stage) -> None:
        """Remember the plan and the stage."""
        self._plan, self._stage = context.plan, stage

    def before(self, step: Pass, module: fx.GraphModule) -> None:
        """Write the graph that the first pass gets."""
        if module not in self._numbers:
            self._numbers[module] = [len(self._numbers), 0]
            self._write(str(self._stage), module, self._stage, str(step))

    def after(self, step: Pass, module: fx.GraphModule, record: PassRecord) -> None:
        """Write the graph if the pass changed it."""
        if record.edits:
            self._write(step.name, module, later(self._stage, step.establishes), str(step))

    def failed(self, step: Pass, module: fx.GraphModule, error: Exception) -> None:
        """Write the text of the graph as the failing pass left it."""
        _write_text(self._path(f"{step.name}-failed", module), graph_text(module, notes=True))

    def lowered(self, backend: str, module: fx.GraphModule) -> None:
        """Write the lowered graph."""
        self._write(f"lowered-to-{backend}", module, Stage.LOWERED, "", backend=backend)

    def _write(self, name: str, module: fx.GraphModule, stage: Stage, step: str, **facts: Any) -> None:
        path = self._path(name, module)
        write_dump(path, dump_of(module, stage, after=step, **facts), graph_text(module, notes=True), self._plan)

    def _path(self, name: str, module: fx.GraphModule) -> Path:
        graph, number = numbers = self._numbers.setdefault(module, [len(self._numbers), 0])
        numbers[1] += 1
        folder = self.folder / f"graph-{graph}" if graph else self.folder
        return folder / f"{number:02d}-{name}"


def write_dump(path: Path, dump: Dump, text: str, plan: Plan | None) -> None:
    """Write a graph as text and dump, and the plan if it can be read back; the folder is created.

    Raises:
        WriteError: If the files cannot be written.
    """
    _write_text(path, text)
    if plan is not None:
        try:
            plan.save(path.with_name(f"{path.name}{PLAN_ENDING}"))
        except ConfigurationError as error:  # A pass that is being written may decide what no plan can hold.
            dump.facts["plan_left_out"] = str(error)
    dump.write(path)


def _write_text(path: Path, text: str) -> None:
    with whole_file(path.with_name(f"{path.name}.txt")) as file:
        file.write_text(text + "\n", encoding="utf-8")


class Reproducer:
    """Instrument that, when a pass fails, writes what ``fxquant opt`` needs to run this pass again, and the command.

    The graph is that just before the pass, with the plan and the statistics that the pass decides from. Weights are
    written if all tensors together have at most 64 MiB; otherwise they are written as shapes only, and a failure that
    depends on their values does not show again.

    Args:
        folder: Where the files go; created only when a pass fails.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._dump: Dump | None = None
        self._text = ""
        self._plan: Plan | None = None
        self._context: PassContext | None = None
        self._stage = Stage.CAPTURED
        self._homes: list[str] = []

    def enter(self, step: Pass, context: PassContext, stage: Stage) -> None:
        """Remember what the pass decides from."""
        self._plan, self._context, self._stage = copy.deepcopy(context.plan), context, stage

    def before(self, step: Pass, module: fx.GraphModule) -> None:
        """Remember the graph."""
        held = [tensor for tensor in read_tensors(module).values() if not isinstance(tensor, FakeTensor)]
        small = sum(tensor.numel() * tensor.element_size() for tensor in held) <= _MOST_BYTES
        self._dump = dump_of(module, self._stage, largest=None if small else LARGEST)
        self._text = graph_text(module, notes=True)
        self._homes = homes_of(module, self._stage)

    def after(self, step: Pass, module: fx.GraphModule, record: PassRecord) -> None:
        """Nothing to do."""

    def failed(self, step: Pass, module: fx.GraphModule, error: Exception) -> None:
        """Write the reproducer, and say how to run it."""
        assert self._dump is not None
        path = self.folder / step.name
        command = f"fxquant opt {shlex.quote(f'{path}.json')} --passes {shlex.quote(str(step))}"
        homes = sorted({type(step).__module__, *self._homes})
        for home in homes:
            if not home.startswith(OWN) and home != _SCRIPT:
                command += f" --import {shlex.quote(home)}"
        self._dump.facts.update(command=command, error=repr(error))
        write_dump(path, self._dump, f"# failed with: {error!r}\n# {command}\n{self._text}", self._plan)
        statistics = None if self._context is None else self._context.statistics
        if statistics is not None:
            statistics.save(path.with_name(f"{path.name}{STATISTICS_ENDING}"))
        error.add_note(f"the graph just before the pass is in {path}.txt; to run the pass on it again: {command}")
        if _SCRIPT in homes:
            error.add_note(
                f"{step.name}, or an op or stage of the graph, is defined in a script or notebook: move it into a "
                "module and add --import MODULE to the command"
            )
