"""The command line of the benchmark: ``python -m benchmarks.cpu`` from the root of the repository."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.cpu.rounds import Digits, Settings, measure, present
from benchmarks.cpu.systems import REFERENCE, System, all_systems
from benchmarks.cpu.table import machine, page, table, to_json
from benchmarks.figures import write
from benchmarks.models import task_of
from benchmarks.shapes import SHAPES

USUAL = "dit:4"


def main() -> None:
    options = _parser().parse_args()
    systems = list(present(_chosen(options.only)))
    with tempfile.TemporaryDirectory() as scratch:
        run(options, systems, Path(scratch))


def run(options: argparse.Namespace, systems: list[System], scratch: Path) -> None:
    """Measure all models; print and write after each, so that an interrupted run keeps its results."""
    log = None if options.verbose else subprocess.DEVNULL
    began = time.monotonic()
    until = None if options.minutes is None else began + 60 * options.minutes
    settings = Settings("", options.batch, options.rounds, options.threads, options.together, log, until)
    found, digits = machine(options.threads), Digits(settings, scratch)
    reports, tables = [], []
    models = options.model.split(",")
    for number, model in enumerate(models, 1):
        # Time that a model leaves goes to the models after it.
        until = None if options.minutes is None else began + 60 * options.minutes * number / len(models)
        settings = replace(settings, model=model, until=until)
        title = task_of(model, options.batch).name
        measured = measure(settings, systems)
        if options.digits:
            digits.fill(measured.rows, systems)
        print(f"\n{title}\n\n{table(measured)}", flush=True)
        reports.append(to_json(title, settings, measured))
        tables.append((title, table(measured, "github")))
        if options.json:
            write(options.json, json.dumps({"machine": found, "models": reports}, indent=1, allow_nan=False) + "\n")
        if options.markdown:
            write(options.markdown, page(found, settings, tables))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu", description="Compare time, memory and error of systems on the CPU."
    )
    names = ", ".join(SHAPES)
    parser.add_argument(
        "--model", default=USUAL, help=f"models joined by commas, each NAME or NAME:LAYERS, of {names}; default {USUAL}"
    )
    parser.add_argument("--rounds", type=int, default=15, help="measured calls of each system, interleaved")
    parser.add_argument("--batch", type=int, default=2, help="samples per call, an even number")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of each system")
    parser.add_argument("--together", type=int, default=32, help="most systems in memory at a time, if they fit")
    parser.add_argument(
        "--minutes",
        type=float,
        help="start no system after so many minutes, divided over the models; the main ones are first",
    )
    parser.add_argument("--only", action="append", help="only systems whose names contain this text; repeatable")
    parser.add_argument("--no-digits", dest="digits", action="store_false", help="leave out the trained model")
    parser.add_argument("--json", type=Path, help="file for all measurements")
    parser.add_argument("--markdown", type=Path, help="file for a page of machine, versions and tables")
    parser.add_argument("--verbose", action="store_true", help="show the output of the systems' processes")
    return parser


def _chosen(only: list[str] | None) -> list[System]:
    """The requested systems, and the reference."""
    texts = only or [""]
    return [
        system for name, system in all_systems().items() if name == REFERENCE or any(text in name for text in texts)
    ]


if __name__ == "__main__":
    main()
