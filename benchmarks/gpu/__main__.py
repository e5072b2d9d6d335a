"""The command line of the benchmark: ``python -m benchmarks.gpu`` from the root of the repository."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from pathlib import Path

import torch

from benchmarks.gpu.report import Options, Report
from benchmarks.models import models_of
from benchmarks.shapes import SHAPES

USUAL = "dit"
SMALL = "tiny,tiny-flux"


def main() -> int:
    parser = _parser()
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
    timed = device.type == "cuda" and not options.check
    try:
        models = models_of(options.model or (USUAL if timed else SMALL), options.batch)
    except ValueError as error:
        parser.error(str(error))
    if not options.verbose:
        warnings.filterwarnings("ignore")
        logging.disable(logging.WARNING)
    torch.set_grad_enabled(False)
    # Torchao sets this precision, and code that was compiled under one precision is not valid under another.
    torch.set_float32_matmul_precision("high")
    report = Report(
        Options(
            models=models,
            shapes=tuple(options.shape),
            systems=tuple(options.only or [""]),
            products=tuple(options.products or [""]),
            parts=options.part,
            rounds=options.rounds if timed else 0,
            budget=options.budget,
            json=options.json,
            markdown=options.markdown,
        ),
        device,
    )
    return report.run()


def _shape(text: str) -> tuple[int, int, int]:
    rows, inputs, outputs = map(int, text.split("x"))
    return rows, inputs, outputs


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="Compare time, memory and error of systems on a GPU."
    )
    names = ", ".join(SHAPES)
    parser.add_argument(
        "--model",
        help=f"models joined by commas, each NAME, NAME:LAYERS or NAME:LAYERS@BATCH, of {names}; default {USUAL}",
    )
    parser.add_argument("--batch", default="2", help="samples per call, joined by commas; default 2")
    parser.add_argument("--shape", type=_shape, action="append", default=[], metavar="ROWSxINPUTSxOUTPUTS",
                        help="a product in addition to those of the models; repeatable")  # fmt: skip
    parser.add_argument("--part", choices=("both", "models", "products"), default="both", help="what to measure")
    parser.add_argument("--only", action="append", help="only systems whose names contain this text; repeatable")
    parser.add_argument("--products", action="append", help="only products whose names contain this text; repeatable")
    parser.add_argument("--rounds", type=int, default=15, help="rounds; each calls all systems")
    parser.add_argument("--budget", type=float, help="seconds after which nothing new is started")
    parser.add_argument("--check", action="store_true", help="check only, on small models; the default without a GPU")
    parser.add_argument("--json", type=Path, help="file for all results, updated after each")
    parser.add_argument("--markdown", type=Path, help="file for a page of device, versions and tables")
    parser.add_argument("--verbose", action="store_true", help="show warnings of the libraries")
    return parser


if __name__ == "__main__":
    sys.exit(main())
