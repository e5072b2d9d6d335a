"""Reads damaged files of all kinds (``make fuzz-load``). Each is refused with a typed error, or read equal.

Cases run in forked processes, which end after a few hundred cases: a process that is killed is a failure of its case.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import pickle
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.conversions import rebuilt_once, worked_out_once
from tests.mutations.cases import Cases, Tally, quiet
from tests.mutations.kinds import KINDS
from tests.traces import known_memos, memos, traced_once

SHARD = 200


def campaign(cases: int, names: list[str], seed: int, folder: Path, report: Path | None, seconds: float) -> bool:
    """Run cases of these kinds, by their shares; return whether none failed.

    Args:
        cases: How many, of all kinds together.
        names: The kinds.
        seed: From which all damage follows.
        folder: An empty folder to work in.
        report: Counts so far are written there as JSON.
        seconds: After this time no further cases begin.
    """
    began = time.monotonic()
    made = {name: Cases(KINDS[name], folder / name.replace(" ", "-")) for name in names}
    others = [path for one in made.values() for path in one.files()]
    print(f"seed {seed}, whole files made in {time.monotonic() - began:.0f} s", flush=True)
    tallies = {name: Tally() for name in names}
    shares = [max(1, KINDS[name].share) for name in names]
    order = random.Random(seed).choices(names, weights=shares, k=cases)
    for start in range(0, cases, SHARD):
        if time.monotonic() - began > seconds:
            break
        for name, tally in _forked(made, others, order[start : start + SHARD], f"{seed}-{start}", folder).items():
            tallies[name].add(tally)
            for failure in tally.failures:
                print(failure, flush=True)
        total = sum(sum(tally.outcomes.values()) for tally in tallies.values())
        print(f"{total} cases, {time.monotonic() - began:.0f} s", flush=True)
        if report is not None:
            rows = {name: {**vars(tally), "cases": sum(tally.outcomes.values())} for name, tally in tallies.items()}
            report.write_text(json.dumps({"seed": seed, "kinds": rows}, indent=1) + "\n")
    for name, tally in tallies.items():
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(tally.outcomes.items()))
        number = sum(tally.outcomes.values())
        print(f"{name:24} {number:6}: {counts}; at most {tally.slowest:.1f} s, {tally.largest} MB")
    return not any(tally.failures for tally in tallies.values())


def _forked(made: dict[str, Cases], others: list[Path], order: list[str], seed: str, folder: Path) -> dict[str, Tally]:
    """Run cases in a forked process."""
    result, last = folder / "result", folder / "last"
    child = os.fork()
    if not child:
        code = 1
        try:
            tallies: dict[str, Tally] = {}
            for number, name in enumerate(order):
                last.write_text(f"{name} {seed}-{number}")
                made[name].run(folder / "cases", f"{seed}-{number}", others, tallies.setdefault(name, Tally()))
                result.write_bytes(pickle.dumps(tallies))
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    found: dict[str, Tally] = pickle.loads(result.read_bytes()) if result.exists() else {}
    if status:
        name = next(name for name in sorted(made, key=len, reverse=True) if last.read_text().startswith(name))
        tally = found.setdefault(name, Tally())
        tally.outcomes["failed"] += 1
        tally.failures.append(f"{last.read_text()}: the process ended with status {status}")
    result.unlink(missing_ok=True)
    shutil.rmtree(folder / "cases", ignore_errors=True)
    return found


def main() -> int:
    """Run the campaign; return 1 if a case failed, otherwise 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=50_000)
    parser.add_argument("--kinds", nargs="*", default=[name for name, kind in KINDS.items() if kind.share])
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--report", type=Path, help="write counts so far as JSON")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further cases after this time")
    options = parser.parse_args()
    torch.set_num_threads(1)  # Forked processes do not have the other threads.
    folder = Path(tempfile.mkdtemp(prefix="fxquant-mutations-"))
    try:
        with memos(known_memos), worked_out_once(), traced_once(), rebuilt_once(), quiet():  # As all tests.
            gc.freeze()
            gc.set_threshold(10_000, 20, 20)
            good = campaign(options.cases, options.kinds, options.seed, folder, options.report, 60 * options.minutes)
    finally:
        shutil.rmtree(folder)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
