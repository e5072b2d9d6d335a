"""Runs the device tests, tunes, measures whole models and judges the targets, in steps of at most a few minutes.

    python -m benchmarks.gpu.measure FOLDER --budget 330

Each result is in the folder as soon as it exists. A second run on the same folder does what is left:

* ``results.jsonl`` has one line per event: tests, tilings, rows of models, steps;
* ``configs.json`` is the table of tilings that the native backend reads;
* ``summary.md`` has the targets, the tables and the tests that failed;
* ``log.txt`` has what the steps print.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import IO, Any

from benchmarks.figures import write
from benchmarks.gpu.agenda import Step, agenda, next_step
from benchmarks.gpu.ledger import Ledger, latest

NEEDS = ("torch", "triton", "diffusers", "networkx", "numpy", "pydantic", "rich", "safetensors", "scipy", "tabulate",
         "typer", "fxquant.backends", "pytest")  # fmt: skip
CACHE = Path("build/measure/cache")
"""Where the native backend finds the table of tilings in this run, and keeps what it compiles."""
TIME_LEFT = 3
"""Exit status if something is left for another run."""
_MOST_CRASHES = 4
_LEAST_SECONDS = 10.0
"""With less time left no step is begun."""


def main() -> int:
    """Run a part of the measurement.

    The exit status is 0 if all is finished and right, 1 if all is finished and something failed, 2 for bad input, and
    :data:`TIME_LEFT`.
    """
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.measure", description=about)
    parser.add_argument("folder", type=Path, help="where results go; a folder of an earlier run is continued")
    parser.add_argument("--budget", type=float, default=330.0, help="seconds of this run; default 330")
    parser.add_argument("--spent", type=float, default=0.0, help="seconds of the budget that have passed")
    parser.add_argument("--rehearse", action="store_true", help="small models in Triton's interpreter, without a GPU")
    options = parser.parse_args()
    end = time.monotonic() + options.budget - options.spent
    if options.budget <= 0:
        parser.error(f"a budget of {options.budget:g} seconds is not possible; give a positive number")
    missing = [name for name in NEEDS if not _found(name)]
    if missing:
        parser.error(
            f"not installed here: {', '.join(missing)}. Collect wheels with `make gpu-wheels` on a machine with "
            "access to packages, carry the folder here, and name it: WHEELS=folder benchmarks/gpu/measure.sh FOLDER"
        )
    device = _device(options.rehearse)
    if device is None:
        parser.error(
            "torch finds no NVIDIA GPU here; measure on a machine with one, or rehearse: REHEARSE=1 "
            "benchmarks/gpu/measure.sh FOLDER"
        )
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
        lock = (options.folder / "results.jsonl").open("a")
    except OSError as error:
        parser.error(f"results cannot be written to {options.folder}: {error}")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            parser.error(f"another run is writing to {options.folder}; wait for it, or name another folder")
        measurement = Measurement(options.folder, options.rehearse, end)
        other = measurement.other_device(device)
        if other is not None:
            parser.error(f"{options.folder} has results of {other}, and this is {device}; name another folder")
        measurement.ledger.add("run", device, rehearsed=options.rehearse, budget=options.budget)
        return measurement.run()


def _found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # The package around it is missing.
        return False


def _device(rehearse: bool) -> str | None:
    if rehearse:
        return "a rehearsal without a GPU"
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


class Measurement:
    """One run on a folder.

    Args:
        folder: The folder.
        rehearse: Whether the run is a rehearsal.
        end: Time, as of :func:`time.monotonic`, at which the run ends.
    """

    def __init__(self, folder: Path, rehearse: bool, end: float) -> None:
        self._folder, self._rehearse, self._end = folder, rehearse, end
        self.ledger = Ledger(folder / "results.jsonl")
        self._steps = agenda(rehearse)
        self._size = -1

    def other_device(self, device: str) -> str | None:
        """The device of earlier runs, if it is another one."""
        return next((name for name in latest(self.ledger.read(), "run") if name != device), None)

    def run(self) -> int:
        """Run steps until all are finished or the time is over."""
        crashes: Counter[str] = Counter()
        left_out: list[str] = []
        while self._end - time.monotonic() >= _LEAST_SECONDS:
            found = next_step(self._steps, self.ledger.read(), left_out)
            if found is None:
                break
            step, most = found
            seconds = min(most, self._end - time.monotonic())
            began = time.monotonic()
            status = self._run_step(step, began + seconds)
            ran = time.monotonic() - began
            self._show()
            if latest(self.ledger.read(), "step").get(step.name, {}).get("state") == "finished":
                self.ledger.add("ran", step.name, seconds=ran)
            elif status == 0:  # Nothing fitted into the rest of its time.
                self.ledger.add("ran", step.name, seconds=max(ran, 0.0 if most == float("inf") else most))
                left_out += [step.name] if most == float("inf") else []
            else:
                self.ledger.add("ran", step.name, seconds=ran)
                crashes[step.name] += status is not None
                left_out += [step.name] if crashes[step.name] >= _MOST_CRASHES else []
        self._show()
        print((self._folder / "summary.md").read_text(encoding="utf-8"), flush=True)
        return self._status()

    def _status(self) -> int:
        entries = self.ledger.read()
        states = latest(entries, "step")
        unfinished = [step.name for step in self._steps if states.get(step.name, {}).get("state") != "finished"]
        if unfinished:
            print(f"Not finished: {', '.join(unfinished)}. Run this again on the same folder.", flush=True)
            return TIME_LEFT
        failed = any(test["outcome"] == "failed" for test in latest(entries, "test").values())
        return int(failed or any(row["row"]["failed"] is not None for row in latest(entries, "row").values()))

    def _run_step(self, step: Step, deadline: float) -> int | None:
        """Run a step in a process of its own; return its exit status, None if it ran out of time."""
        print(f"{step.name}: at most {deadline - time.monotonic():.0f} s", file=sys.stderr, flush=True)
        with (self._folder / "log.txt").open("a", encoding="utf-8") as log:
            print(f"\n== {step.name}", file=log, flush=True)
            status = self._wait(self._start(step, deadline, log), deadline)
        if step.kind == "tests" and status is not None:
            if status in (0, 1, 5):  # All passed, some failed, or none was left.
                self.ledger.add("step", step.name, state="finished")
            else:
                text = (self._folder / "log.txt").read_text(encoding="utf-8", errors="replace")[-500:]
                self.ledger.add("step", step.name, state=f"pytest ended with status {status}", text=text)
        elif status:
            self.ledger.add("step", step.name, state=f"its process ended with status {status}; see log.txt")
        return status

    def _start(self, step: Step, deadline: float, log: IO[str]) -> subprocess.Popen[bytes]:
        configs = self._folder / "configs.json"
        CACHE.mkdir(parents=True, exist_ok=True)
        if configs.exists():
            shutil.copy(configs, CACHE / "gpu-configs.json")
        else:
            (CACHE / "gpu-configs.json").unlink(missing_ok=True)
        environment: dict[str, str] = os.environ | {"FXQUANT_CACHE": str(CACHE.absolute()), "PYTHONUNBUFFERED": "1"}
        if self._rehearse:
            environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        if step.kind == "tests":
            command = ["pytest", "-p", "benchmarks.gpu.recording", "--ledger", str(self.ledger.path)]
            command += ["-q", "--no-header", "-p", "no:cacheprovider", *self._processes(), *step.paths]
        else:
            command = ["benchmarks.gpu.step", step.name, str(self._folder), "--deadline", str(deadline - 2.0)]
            command += ["--rehearse"] if self._rehearse else []
        return subprocess.Popen(
            [sys.executable, "-m", *command], stdout=log, stderr=log, env=environment, start_new_session=True
        )

    def _processes(self) -> list[str]:
        """Options for several test processes: most of the time is that of Triton's compiler."""
        if self._rehearse or importlib.util.find_spec("xdist") is None:
            return []
        return ["-n", str(max(1, min(10, (os.cpu_count() or 1) - 2))), "--dist", "worksteal"]

    def _wait(self, process: subprocess.Popen[bytes], deadline: float) -> int | None:
        """Wait for a process, and end it and its children at the deadline."""
        try:
            while time.monotonic() < deadline:
                try:
                    return process.wait(timeout=min(2.0, max(0.1, deadline - time.monotonic())))
                except subprocess.TimeoutExpired:
                    self._show()
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _show(self) -> None:
        """Write the page again if there are new results."""
        size = self.ledger.path.stat().st_size
        if size != self._size:
            from benchmarks.gpu.summary import summary  # Imports what `main` finds missing.

            self._size = size
            entries: list[dict[str, Any]] = self.ledger.read()
            write(self._folder / "summary.md", summary(entries, self._steps))


if __name__ == "__main__":
    sys.exit(main())
