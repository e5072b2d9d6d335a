"""Whole models: makes and checks systems and calls them in interleaved rounds, as many at a time as fit in memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from benchmarks.gpu.check import Wrong, check_model
from benchmarks.gpu.job import Job, free, held
from benchmarks.gpu.matmuls import Lost, reason, say, still_there
from benchmarks.gpu.modes import RECORDED, Mode, Run, runner
from benchmarks.gpu.systems import Made, System, settings_kept
from benchmarks.gpu.timing import Turn, take_turns

_FIRST_ROUNDS = 3
"""Rounds of each system with the reference as soon as it is ready, so that an interrupted run has results."""
_TO_MAKE = 2.0
"""Memory that making and compiling a system may need, as a multiple of the largest peak in a call so far."""

_LATE = "the time limit was reached"
_NO_MEMORY = torch.OutOfMemoryError.__name__


@dataclass
class Row:
    """Results of one system; a system that failed has a reason and no times.

    Attributes:
        system: Its name.
        failed: Why there are no times.
        wrong: Whether it failed because a check failed.
        sqnr_db: SQNR of its output.
        seconds: Seconds of its calls, one per round.
        ratios: Time of the reference over its own time, one per round.
        started: Seconds until it could be called, including compilation and tuning. The first of the systems that share
            a module includes the time of making the module.
        weights: Bytes on the device before its first call.
        peak: The most bytes in a call.
    """

    system: str
    failed: str | None = None
    wrong: bool = False
    sqnr_db: float | None = None
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    started: float | None = None
    weights: int | None = None
    peak: int | None = None

    @property
    def speedup(self) -> float | None:
        """Speed relative to the reference, the median over rounds."""
        return statistics.median(self.ratios) if self.ratios else None


@dataclass
class _Seat:
    row: Row
    turn: Turn


class Session:
    """The systems of one job.

    Args:
        job: The job to run.
        rounds: Number of rounds; 0 to check only.
        ended: Returns whether the time limit has passed.
        changed: Called with all rows after each change.
        begins: Called with the name of a system before it is made.
        kept: Modules and their bytes by name; sessions of one model that share this need not make them again.
        compiler: Backend of ``torch.compile``.
    """

    def __init__(
        self,
        job: Job,
        rounds: int,
        ended: Callable[[], bool],
        changed: Callable[[list[Row]], None],
        begins: Callable[[str], None] = lambda name: None,
        kept: dict[str, tuple[nn.Module, int | None]] | None = None,
        compiler: str = "inductor",
    ) -> None:
        self._job, self._rounds, self._ended, self._changed = job, rounds, ended, changed
        self._begins, self._kept, self._compiler = begins, kept, compiler
        self.rows: list[Row] = []
        self._made: tuple[Made, nn.Module, int | None] | None = None
        self._largest = 0
        self._first_rounds = min(rounds, _FIRST_ROUNDS)

    def measure(self, systems: Sequence[System]) -> list[Row]:
        """Check and time systems. The first one is the reference.

        Raises:
            Lost: If the device no longer responds; :attr:`rows` has the results so far.
        """
        reference, *pending = systems
        try:
            self._measure(reference, pending)
        except Lost as error:
            self._leave_out(pending, str(error))
            raise
        self._close()
        return self.rows

    def _measure(self, system: System, pending: list[System]) -> None:
        reference = Row(system.name)
        self.rows.append(reference)
        first = True
        while first or pending:
            if self._ended():
                reference.failed = _LATE if first else None
                self._leave_out(pending, _LATE)
                return
            seat = self._start(system, reference)
            if seat is None:
                self._leave_out(pending, "the reference failed")
                return
            self._group(seat, pending)
            first = False

    def _group(self, reference: _Seat, pending: list[System]) -> None:
        """Start as many systems as memory and time allow, and call them in interleaved rounds."""
        seats = [reference]
        while pending and (len(seats) == 1 or self._fits()):
            system = pending.pop(0)
            row = Row(system.name)
            self.rows.append(row)
            if self._ended():
                row.failed = _LATE
                continue
            seat = self._start(system, row)
            if seat is None and row.failed is not None and row.failed.startswith(_NO_MEMORY) and len(seats) > 1:
                self.rows.remove(row)
                pending.insert(0, system)  # It may fit in a group without the other systems.
                break
            if seat is not None:
                seats.append(seat)
                self._take(
                    [Turn(reference.turn.run, []), Turn(seat.turn.run, [])], [reference.row, row], self._first_rounds
                )
            self._changed(self.rows)
        if self._rounds and (len(seats) == 1 or not self._ended()):
            self._take([seat.turn for seat in seats], [seat.row for seat in seats], self._rounds)
        self._changed(self.rows)
        seats.clear()
        self._close()

    def _take(self, turns: Sequence[Turn], rows: Sequence[Row], rounds: int) -> None:
        """Call the systems in rounds. The results replace those of earlier rounds in the rows."""
        if not self._rounds:
            return
        take_turns(turns, rounds, self._ended)
        first = turns[0].seconds
        for turn, row in zip(turns, rows, strict=True):
            row.seconds = list(turn.seconds)
            row.ratios = [one / other for one, other in zip(first, turn.seconds, strict=True)]

    def _start(self, system: System, row: Row) -> _Seat | None:
        say(f"{self._job.task.name}: {system.name}")
        self._begins(system.name)
        row.failed = system.made.missing(self._job.device)
        if row.failed is None:
            began = time.perf_counter()
            try:
                with settings_kept():
                    run = self._run(system, row)
                row.started = time.perf_counter() - began if self._rounds else None
                row.sqnr_db = check_model(run, self._job.exact, system.made.least_db)
                return _Seat(row, Turn(run, []))
            except Exception as error:  # Reported in the table; the other systems continue.
                row.failed, row.wrong = reason(error), isinstance(error, Wrong)
                still_there(error)
        say(f"    left out: {row.failed}")
        return None

    def _run(self, system: System, row: Row) -> Run:
        module, row.weights = self._module(system.made)
        mode = system.mode
        if row.weights is None:
            return runner(module, mode, self._job.timed, self._compiler)
        before = held(self._job.device)
        if mode in RECORDED:
            if RECORDED[mode] is not Mode.EAGER:  # Compilation needs more memory than a call.
                runner(module, RECORDED[mode], self._job.timed, self._compiler)()
            torch.cuda.reset_peak_memory_stats(self._job.device)
            run = runner(module, mode, self._job.timed, self._compiler)
        else:
            run = runner(module, mode, self._job.timed, self._compiler)
            run()  # Compilation and tuning need more memory than a call.
            torch.cuda.reset_peak_memory_stats(self._job.device)
            run()
        row.peak = row.weights + torch.cuda.max_memory_allocated(self._job.device) - before
        self._largest = max(self._largest, row.peak)
        return run

    def _module(self, made: Made) -> tuple[nn.Module, int | None]:
        """The module, which consecutive systems of the same `Made` share, and its bytes."""
        if self._kept is not None and made.name in self._kept:
            return self._kept[made.name]
        if self._made is None or self._made[0] is not made:
            self._made = None
            measured = self._job.device.type == "cuda" and self._rounds > 0
            _ = self._job.exact, self._job.timed, self._job.calls  # Made first, so that shared tensors do not count.
            before = held(self._job.device) if measured else 0
            module = made.make(self._job)
            self._made = made, module, held(self._job.device) - before if measured else None
            if self._kept is not None:
                self._kept[made.name] = self._made[1:]
        return self._made[1:]

    def _fits(self) -> bool:
        """Whether memory certainly suffices for another system."""
        if self._job.device.type != "cuda":
            return True
        free()
        return torch.cuda.mem_get_info(self._job.device)[0] > _TO_MAKE * self._largest

    def _leave_out(self, systems: list[System], why: str) -> None:
        self.rows += [Row(system.name, failed=why) for system in systems]
        systems.clear()
        self._changed(self.rows)

    def _close(self) -> None:
        """Release all modules, compiled code and recorded graphs."""
        self._made = None
        torch._dynamo.reset()
        if self._job.device.type == "cuda":
            from torch._inductor.cudagraph_trees import reset_cudagraph_trees

            reset_cudagraph_trees()
        free()
