"""One run: measures products, then models, and prints and writes results as they arrive."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.figures import write
from benchmarks.gpu import matmuls
from benchmarks.gpu.job import Job
from benchmarks.gpu.matmuls import Cell, Lost, say
from benchmarks.gpu.products import Shape
from benchmarks.gpu.session import Row, Session
from benchmarks.gpu.systems import System, all_systems
from benchmarks.gpu.table import NOT_TIMED, machine, page, peaks_line, products_table, row_to_json, systems_table
from benchmarks.gpu.timing import ColdCaches
from benchmarks.models import linear_shapes, task_of

_FEW_ROWS = 64
"""Products of up to this many rows are limited by memory, so their share of the peak means nothing."""


@dataclass(frozen=True)
class Options:
    """Options of one run.

    Attributes:
        models: Names and batch sizes.
        shapes: Shapes of products in addition to those of the models.
        systems: Names of selected systems contain one of these texts.
        products: Names of selected products contain one of these texts.
        parts: ``models``, ``products`` or ``both``.
        rounds: Number of rounds; 0 to check only.
        budget: Seconds after which nothing new is started.
        json: File for all results.
        markdown: File for a page.
    """

    models: tuple[tuple[str, int], ...]
    shapes: tuple[Shape, ...]
    systems: tuple[str, ...]
    products: tuple[str, ...]
    parts: str
    rounds: int
    budget: float | None
    json: Path | None
    markdown: Path | None


class Report:
    """All results of a run so far."""

    def __init__(self, options: Options, device: torch.device) -> None:
        self._options, self._device = options, device
        self._deadline = float("inf") if options.budget is None else time.monotonic() + options.budget
        self._machine = machine(device)
        self._caches = ColdCaches(device) if options.rounds and options.parts != "models" else None
        self._cells: dict[Shape, list[Cell]] = {}
        self._peaks: dict[str, float] = {}
        self._sections: dict[str, str] = {}
        self._reports: dict[str, dict[str, Any]] = {}
        self._wrong = False

    def run(self) -> int:
        """Measure everything; return exit status 1 if a check failed, 2 if the device was lost, otherwise 0."""
        if not self._options.rounds:
            print(NOT_TIMED, flush=True)
        try:
            self._run()
        except Lost as error:
            say(str(error))
            self._write()
            return 2
        return int(self._wrong)

    def _run(self) -> None:
        options = self._options
        if options.parts != "models":
            if options.rounds:
                # The peak is taken over all products, not only the requested ones.
                squares = [cell for side in matmuls.SQUARES for cell in self._products((side, side, side), ("",))]
                self._peaks = matmuls.peaks(squares)
                self._show("Large squares", peaks_line(self._peaks) + "\n\n" + self._products_text(squares, {}))
            shapes = options.shapes or (() if options.rounds else matmuls.SMALL)
            if shapes:
                cells = [cell for shape in shapes for cell in self._products(shape)]
                self._show("Products", self._products_text(cells, {}))
        for model, batch in options.models:
            self._model(model, batch)

    def _model(self, model: str, batch: int) -> None:
        task = task_of(model, batch)
        if importlib.util.find_spec("diffusers") is None:
            self._show(task.name, "Not measured: diffusers, which defines the model, is not installed.")
            return
        if self._options.parts != "models" and self._options.rounds:
            counts = {shape: count for shape, count in linear_shapes(task).items() if shape[0] > _FEW_ROWS}
            cells = [cell for shape in sorted(counts) for cell in self._products(shape)]
            if cells:
                self._show(f"Products of {task.name}", self._products_text(cells, counts))
        if self._options.parts == "products":
            return
        job = Job(task, self._device)

        def changed(rows: list[Row]) -> None:
            self._reports[task.name] = {
                "title": task.name,
                "model": model,
                "batch": batch,
                "rows": [row_to_json(row) for row in rows],
            }
            self._wrong |= any(row.wrong for row in rows)
            self._sections[task.name] = systems_table(rows, "github")
            self._write()

        session = Session(job, self._options.rounds, self._ended, changed)
        rows = session.measure(self._systems())
        if self._ended() and all(row.sqnr_db is None for row in rows):
            return
        self._reports[task.name]["exact"] = job.exact.said
        said = f"SQNR against {job.exact.said}."
        print(f"\n{task.name}\n\n{systems_table(rows)}\n\n{said}", flush=True)
        self._sections[task.name] += f"\n\n{said}"
        self._write()

    def _systems(self) -> list[System]:
        """The requested systems, and the reference."""
        reference, *others = all_systems(self._device)
        texts = self._options.systems
        return [reference, *(system for system in others if any(text in system.name for text in texts))]

    def _products(self, shape: Shape, texts: Sequence[str] | None = None) -> list[Cell]:
        """Measure the products of a shape whose names contain one of the texts, once; empty after the time limit."""
        if shape not in self._cells and not self._ended():
            say(f"products of {shape}")
            products = matmuls.chosen(texts or self._options.products)
            self._cells[shape] = matmuls.measure_shape(
                shape, products, self._device, max(1, self._options.rounds // 3), self._caches
            )
            self._wrong |= any(cell.wrong for cell in self._cells[shape])
            self._write()
        return self._cells.get(shape, [])

    def _products_text(self, cells: list[Cell], counts: dict[Shape, int], tablefmt: str = "github") -> str:
        return products_table(cells, self._peaks, counts, tablefmt) if cells else "None: the time limit was reached."

    def _show(self, title: str, text: str) -> None:
        self._sections[title] = text
        print(f"\n{title}\n\n{text}", flush=True)
        self._write()

    def _ended(self) -> bool:
        return time.monotonic() > self._deadline

    def _write(self) -> None:
        options = self._options
        if options.json:
            data = {
                "machine": self._machine,
                "timed": bool(options.rounds),
                "rounds": options.rounds,
                "peaks": self._peaks,
                "products": [row_to_json(cell) for cells in self._cells.values() for cell in cells],
                "models": list(self._reports.values()),
            }
            write(options.json, json.dumps(data, indent=1, allow_nan=False) + "\n")
        if options.markdown:
            write(options.markdown, page(self._machine, options.rounds, list(self._sections.items())))
