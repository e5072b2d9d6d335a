"""Runs cases: one damaged copy of one kind each, which is read and used."""

from __future__ import annotations

import itertools
import os
import random
import re
import shutil
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fxquant.errors import FxquantError
from tests.mutations.changes import changed
from tests.mutations.kinds import Kind
from tests.traces import traced_anew

SECONDS, MEGABYTES = 5.0, 200
"""Limits of a case: CPU seconds (or three times the CPU time of reading what is whole, on a busy machine), and MB."""
UNTOLD = re.compile(
    r"adapters\.safetensors: cast to floats .*\.lora_|plan\.safetensors: in its place \S*/plan\.safetensors"
)
"""Damage that no check can tell: a LoRA may have any dtype of floats, and the factors of another checkpoint of the same
layers are as valid, though a LoRA computes something else with them."""
_HANGS = 60.0  # CPU seconds after which a case is ended.


class TooSlowError(BaseException):
    """Ends a case; no handler of errors catches it."""


@dataclass
class Whole:
    """What is not damaged yet.

    Attributes:
        folder: Its folder.
        content: What reading it gives.
    """

    folder: Path
    content: str


@dataclass
class Tally:
    """Outcomes of cases of one kind.

    Attributes:
        outcomes: How many were ``refused``, are ``equal``, hold other ``valid`` values, or ``failed``.
        slowest: The most CPU seconds of one case.
        largest: The most MB that one case took.
        failures: Descriptions of failures.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    largest: int = 0
    failures: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Add the outcomes of other cases."""
        self.outcomes += other.outcomes
        self.slowest, self.largest = max(self.slowest, other.slowest), max(self.largest, other.largest)
        self.failures += other.failures


@dataclass
class Cases:
    """Cases of one kind.

    Args:
        kind: The kind.
        root: An empty folder for what is whole.
        most: The most folders that are made whole; None for all.
    """

    kind: Kind
    root: Path
    most: int | None = None
    wholes: list[Whole] = field(default_factory=list)

    def __post_init__(self) -> None:
        with quiet():
            for folder in itertools.islice(self.kind.make(self.root), self.most):
                with _copied(folder, self.root / "scratch" / folder.name) as copy:
                    self.wholes.append(Whole(folder, self.kind.read(copy)))

    def files(self) -> list[Path]:
        """All whole files."""
        return sorted(path for whole in self.wholes for path in whole.folder.rglob("*") if path.is_file())

    def run(self, scratch: Path, seed: str, others: list[Path], tally: Tally) -> None:
        """Run the case of a seed, and count its outcome.

        Args:
            scratch: A folder for the copy.
            seed: From which the damage follows.
            others: Files of all kinds, which may be put in place of one of this kind.
            tally: Gets the outcome.
        """
        rng = random.Random(seed)
        whole = rng.choice(self.wholes)
        with _copied(whole.folder, scratch / f"{seed}-{whole.folder.name}") as folder:
            change = self.kind.change or changed
            told = f"{self.kind.name} {seed} {whole.folder.name} {change(folder, others, rng)}"
            before = _start_watching()
            began = time.process_time()
            failure = ""
            try:
                with quiet(), _ended_after(_HANGS):
                    content = self.kind.read(folder)
                may_differ = self.kind.valid or UNTOLD.search(told) is not None
                outcome = "equal" if content == whole.content else "valid" if may_differ else "failed"
                failure = "" if outcome != "failed" else "it was read, and computes something else"
            except FxquantError as error:
                outcome = "refused"
                if len(str(error)) >= 4000:
                    failure = f"a message of {len(str(error))} characters"
            except (Exception, TooSlowError) as error:
                outcome, failure = "failed", _where(error)
        seconds, megabytes = time.process_time() - began, _highest() - before
        tally.slowest, tally.largest = max(tally.slowest, seconds), max(tally.largest, megabytes)
        if seconds > SECONDS and seconds > 3 * self._seconds(whole):
            failure = failure or f"{seconds:.1f} s"
        if megabytes > MEGABYTES:
            failure = failure or f"{megabytes} MB"
        tally.outcomes["failed" if failure else outcome] += 1
        if failure:
            tally.failures.append(f"{told}: {failure}")

    def _seconds(self, whole: Whole) -> float:
        """CPU seconds of reading what is whole, its trace included."""
        with traced_anew(), quiet(), _copied(whole.folder, self.root / "scratch" / whole.folder.name) as folder:
            began = time.process_time()
            self.kind.read(folder)
            return time.process_time() - began


def _where(error: BaseException) -> str:
    """An error, and the last three lines of fxquant that it passed."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
    places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[-3:]]
    return f"{type(error).__name__}: {str(error)[:300]} ({' > '.join(places)})"


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _copied(whole: Path, folder: Path) -> Iterator[Path]:
    shutil.copytree(whole, folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    def end(*_: Any) -> None:
        raise TooSlowError(f"ended after {seconds:g} CPU seconds")

    before = signal.signal(signal.SIGPROF, end)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _start_watching() -> int:
    """Reset the peak memory of this process; return its present memory in MB."""
    if os.path.exists("/proc/self/clear_refs"):
        Path("/proc/self/clear_refs").write_text("5")
    return _highest()


def _highest() -> int:
    """Peak memory of this process in MB; 0 if the operating system does not report it."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) >> 10 for line in lines if line.startswith("VmHWM")), 0)
