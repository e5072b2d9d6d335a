"""Starts the processes of the systems and calls them in interleaved rounds."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy

from benchmarks.cpu.systems import REFERENCE, System


@dataclass
class Settings:
    """Settings of one run.

    Attributes:
        model: Model and layers, such as ``dit:4``.
        batch: Samples per call.
        rounds: Measured calls of each system.
        threads: Threads of each system.
        together: The most systems in memory at a time, if they fit. Each such group is measured together with the
            reference.
        log: Where the standard error of the processes goes.
        until: Value of ``time.monotonic`` after which no further system is started; None for no end.
    """

    model: str
    batch: int
    rounds: int
    threads: int
    together: int
    log: Any = subprocess.DEVNULL
    until: float | None = None

    @property
    def has_time(self) -> bool:
        """Whether another system may be started."""
        return self.until is None or time.monotonic() < self.until


NO_TIME = "not started, because the time was used up (--minutes)"
_TO_MAKE = 4
"""Memory that making a system may need, as a multiple of the float model's."""


def available_memory() -> int | None:
    """Bytes that can be allocated without swapping; None if the operating system does not tell."""
    path = Path("/proc/meminfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


class Failed(Exception):
    """A system could not be made or called; the message gives the reason."""


class Process:
    """One worker process. Messages are lines of JSON."""

    def __init__(
        self, settings: Settings, mode: str, system: str = "", folder: str = "", scratch: str = "", **more: Any
    ) -> None:
        order = {
            "mode": mode, "system": system, "model": settings.model, "batch": settings.batch,
            "threads": settings.threads, "folder": folder, "scratch": scratch, **more,
        }  # fmt: skip
        self.child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.cpu.worker", json.dumps(order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=settings.log,
            text=True,
        )

    def read(self) -> dict[str, Any]:
        """The next message.

        Raises:
            Failed: If the worker reports a failure or ends.
        """
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        if not line:
            raise Failed(f"its process ended with {self.child.wait()}")
        message: dict[str, Any] = json.loads(line)
        if "failed" in message:
            self.child.wait()
            raise Failed(message["failed"])
        return message

    def turn(self) -> dict[str, Any]:
        """Make one call and return its message."""
        assert self.child.stdin is not None
        try:
            self.child.stdin.write("\n")
            self.child.stdin.flush()
        except BrokenPipeError:
            raise Failed(f"its process ended with {self.child.wait()}") from None
        return self.read()

    def close(self) -> None:
        """End the worker and wait for it."""
        assert self.child.stdin is not None and self.child.stdout is not None
        with suppress(BrokenPipeError):  # It may have ended already.
            self.child.stdin.close()
        self.child.stdout.close()
        self.child.wait()


class Stores:
    """The files that systems load, made once for all systems that share them."""

    def __init__(self, settings: Settings, scratch: Path) -> None:
        self.settings, self.scratch = settings, scratch
        self._failures: dict[str, str | None] = {}

    def folder(self, system: System) -> str:
        """The folder of a system's files, which are made if needed; empty for a system without files.

        Raises:
            Failed: If they cannot be made.
        """
        if system.stored is None:
            return ""
        folder = self.scratch / f"stored-{system.stored.name}"
        if system.stored.name not in self._failures:
            folder.mkdir()
            process = Process(self.settings, "prepare", system.name, str(folder))
            try:
                process.read()
                self._failures[system.stored.name] = None
            except Failed as error:
                self._failures[system.stored.name] = str(error)
            finally:
                process.close()
        reason = self._failures[system.stored.name]
        if reason is not None:
            raise Failed(reason)
        return str(folder)


@dataclass
class Row:
    """Measurements of one system; a system that failed has only a reason.

    Attributes:
        system: Its name.
        failed: Why there are no figures.
        seconds: Seconds of its calls, one per round.
        ratios: Time of the reference over its own time, one per round.
        started: Seconds until its first output, without the time of making what is stored.
        sqnr_db: SQNR of its output against the reference's; None for the reference.
        digits_db: The same on the trained model; None if not measured.
        digits_failed: Why `digits_db` is missing, if the measurement was tried.
        resident: Bytes after the calls, minus the bytes after the imports.
        peak: The most bytes, minus the bytes after the imports.
    """

    system: str
    failed: str | None = None
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    started: float | None = None
    sqnr_db: float | None = None
    digits_db: float | None = None
    digits_failed: str | None = None
    resident: int | None = None
    peak: int | None = None

    @property
    def median(self) -> float:
        """The median seconds of the rounds."""
        return statistics.median(self.seconds)

    @property
    def speedup(self) -> float:
        """Speed relative to the reference, the median over rounds."""
        return statistics.median(self.ratios)


@dataclass
class Measured:
    """All measurements of one model.

    Attributes:
        rows: One row per system, the reference first.
        operations: Operations in the linears of a call.
        peaks: Billions of integer operations per second, one value per round.
        note: Why there are no peaks.
    """

    rows: list[Row]
    operations: int = 0
    peaks: list[float] = field(default_factory=list)
    note: str | None = None

    @property
    def floor(self) -> float | None:
        """Seconds that the linears of a call take at the rate of integer products; None if no rate was measured."""
        return self.operations / (1e9 * statistics.median(self.peaks)) if self.peaks else None


def measure(settings: Settings, systems: Sequence[System]) -> Measured:
    """Measure systems. The first one is the reference."""
    assert systems[0].name == REFERENCE
    with tempfile.TemporaryDirectory() as scratch:
        session = _Session(settings, Path(scratch))
        reference = session.start(systems[0])
        try:
            if reference.row.failed is not None:
                return Measured([reference.row])
            measured = Measured([reference.row])
            session.start_roofline(measured)
            pending = sorted(systems[1:], key=lambda system: not system.main)
            while pending or not reference.row.seconds:
                session.group(measured, reference, pending)
            order = [system.name for system in systems]
            measured.rows.sort(key=lambda row: order.index(row.system))
        finally:
            session.close()
    return measured


@dataclass
class _Seat:
    row: Row
    process: Process | None = None
    output: Any = None


class _Session:
    """The processes of one measurement."""

    def __init__(self, settings: Settings, scratch: Path) -> None:
        self.settings, self.scratch = settings, scratch
        self.stores = Stores(settings, scratch)
        self.open: list[Process] = []
        self.roofline: Process | None = None

    def start(self, system: System) -> _Seat:
        """Make a system and call it once; its row records a failure."""
        seat = _Seat(Row(system.name))
        began = time.perf_counter()
        folder = self.scratch / f"{len(list(self.scratch.iterdir()))}"
        folder.mkdir()
        process = None
        try:
            stored = self.stores.folder(system)
            process = Process(self.settings, "serve", system.name, stored, str(folder))
            self.open.append(process)
            said = process.read()
            seat.process, seat.output = process, numpy.load(said["output"])
            seat.row.started, seat.row.resident, seat.row.peak = said["started"], said["resident"], said["peak"]
            say(f"{system.name}: ready after {time.perf_counter() - began:.0f} s")
        except Failed as error:
            self.fail(seat, error)
        return seat

    def start_roofline(self, measured: Measured) -> None:
        """Start the process that measures the roofline."""
        process = Process(self.settings, "roofline")
        try:
            measured.operations = process.read()["operations"]
            self.roofline = process
            self.open.append(process)
        except Failed as error:
            measured.note = str(error)
            process.close()
            say(f"no roofline: {error}")

    def group(self, measured: Measured, reference: _Seat, pending: list[System]) -> None:
        """Start pending systems while memory suffices, measure them with the reference, and end them."""
        seats: list[_Seat] = []
        while pending and (not seats or self.has_room(reference, len(seats) + 1)):
            if not self.settings.has_time:
                measured.rows += [Row(system.name, NO_TIME) for system in pending]
                pending.clear()
                break
            seats.append(self.start(pending.pop(0)))
        for seat in seats:
            measured.rows.append(seat.row)
            if seat.output is not None:
                seat.row.sqnr_db = sqnr_db(reference.output, seat.output)
        for _ in range(self.settings.rounds):
            self.round(measured, [reference, *seats])
        for seat in seats:
            if seat.process is not None:
                seat.process.close()
                self.open.remove(seat.process)

    def has_room(self, reference: _Seat, held: int) -> bool:
        """Whether one more system can be made; some temporarily need several times the memory of the float model."""
        free = available_memory()
        enough = free is None or free > _TO_MAKE * (reference.row.peak or 0)
        return held < self.settings.together and enough

    def round(self, measured: Measured, seats: Sequence[_Seat]) -> None:
        """Call each system once."""
        base = None
        for seat in seats:
            if seat.process is None:
                continue
            try:
                seconds = seat.process.turn()["seconds"]
            except Failed as error:
                self.fail(seat, error)
                continue
            base = seconds if base is None else base
            seat.row.seconds.append(seconds)
            seat.row.ratios.append(base / seconds)
        if self.roofline is not None:
            measured.peaks.append(max(self.roofline.turn()["rates"].values()))

    def fail(self, seat: _Seat, error: Failed) -> None:
        """Record why a system has no figures."""
        seat.row.failed = str(error)
        seat.process = None
        say(f"{seat.row.system}: failed: {error}")

    def close(self) -> None:
        """End all processes."""
        for process in self.open:
            process.close()


@dataclass
class Digits:
    """SQNR of systems on the trained model, each measured on first request."""

    settings: Settings
    scratch: Path
    known: dict[str, float | Failed] = field(default_factory=dict)

    def fill(self, rows: Sequence[Row], systems: Sequence[System]) -> None:
        """Put the SQNR, or why it is missing, into rows of working systems other than the reference."""
        named = {system.name: system for system in systems}
        for row in rows:
            if row.failed is not None or row.system == REFERENCE:
                continue
            if row.system not in self.known:
                self.known[row.system] = self._measure(named[row.system])
            found = self.known[row.system]
            row.digits_db = None if isinstance(found, Failed) else found
            row.digits_failed = str(found) if isinstance(found, Failed) else None

    def _measure(self, system: System) -> float | Failed:
        if not self.settings.has_time:
            return Failed(NO_TIME)
        folder = self.scratch / ("none" if system.stored is None else system.stored.name)
        folder.mkdir(exist_ok=True)
        process = Process(replace(self.settings, model="digits"), "digits", system.name, str(folder))
        try:
            found: float = process.read()["sqnr_db"]
            say(f"{system.name}: {found:.1f} dB on digits")
            return found
        except Failed as error:
            say(f"{system.name}: failed on digits: {error}")
            return error
        finally:
            process.close()


def sqnr_db(exact: Any, output: Any) -> float:
    """Signal to quantization noise of an output, in dB."""
    exact = exact.astype(numpy.float64)
    noise = numpy.square(exact - output).sum()
    return float("inf") if noise == 0 else float(10 * numpy.log10(numpy.square(exact).sum() / noise))


def present(systems: Sequence[System]) -> Iterator[System]:
    """The systems whose packages are installed; print a line for each of the others."""
    for system in systems:
        if system.missing:
            say(
                f"{system.name}: left out, because {' and '.join(system.missing)} is not installed; "
                "pip install '.[bench,bench-more]'"
            )
        else:
            yield system


def say(text: str) -> None:
    """Print a line of progress."""
    print(text, file=sys.stderr, flush=True)
