"""Measure recipes in every number format, and what each part of the recipes that choose is worth.

``python -m benchmarks.low_bit`` prints Markdown tables: SQNR of the output against the float model, mean over the test
timesteps and at the worst one, and sizes. Measurements are written into a JSON file as they are made; the same command
continues after an interruption. Each model is calibrated once for all recipes. Everything takes an hour or two on one
core.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.low_bit import ablation, page, tables
from benchmarks.low_bit.measure import SUBJECTS, Results

_DIGITS = ("plain", "planted")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.low_bit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--only", choices=["tables", "ablation"], help="only one of both")
    parser.add_argument("--json", type=Path, default=Path("out/low_bit.json"), help="file of the measurements")
    parser.add_argument("--print", action="store_true", help="measure nothing; print what the file holds")
    parser.add_argument("--picture", type=Path, help="also draw the ablation over the timesteps, as .svg, .png or .pdf")
    parser.add_argument("--into", type=Path, help="also write the tables into this page, as docs/results.md")
    options = parser.parse_args(arguments)
    results, printed = Results(options.json), {}
    if options.only != "ablation":
        if not options.print:
            results.fill(tables.jobs(options.models), "recipes and formats")
        printed["tables"] = tables.text(results, options.models)
    if options.only != "tables":
        names = [name for name in options.models if name in _DIGITS]
        if not options.print:
            results.fill(ablation.jobs(names), "ablation")
        printed["ablation"] = ablation.text(results, names)
        if options.picture is not None and names:
            ablation.draw(results, names[-1], options.picture)
    print("\n\n".join(printed.values()))
    if options.into is not None:
        page.insert(options.into, printed)


if __name__ == "__main__":
    main()
